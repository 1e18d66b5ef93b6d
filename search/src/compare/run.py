"""Making the clips of a comparison: dense ones first, then row by row, each stored as it is finished."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffsparse import pipelines
from diffsparse.pipelines.resolve import makes_images
from diffsparse.plan import JSON_NAME, SparsityPlan
from diffsparse.preset_plans import preset
from diffsparse.search import metrics
from diffsparse.search.clip_report import clip_report
from diffsparse.search.columns import shorten
from diffsparse.search.compare.calls import capture_calls, judge_calls
from diffsparse.search.compare.methods import OutOfReach, find_value, knob_of
from diffsparse.search.compare.pictures import write_clip_picture
from diffsparse.search.compare.record import Record, Shard
from diffsparse.search.compare.rows import METHOD, PLAN, SEARCHED, Row
from diffsparse.search.compare.trajectory import Trajectory, find_trajectory
from diffsparse.search.errors import BadInput, DiskFull
from diffsparse.search.evaluate import NoiseFloor, device_of, finite, other_dense_kernel, run_warm_up, why_dense
from diffsparse.search.executed import executed_work
from diffsparse.search.generate import Clip, GenerationSettings, generate_clip
from diffsparse.search.load import check_plan_runs, model_class, sparse_backend
from diffsparse.search.measured import plan_digest
from diffsparse.search.recompose import compose_plan
from diffsparse.search.store import StoreMismatch

__all__ = ["SHOWN", "Runner"]

#: Inputs whose first clip is shown in the page, at most.
SHOWN = 3


class Runner:
    """Makes what a record lacks. ``shard``: which part, where several processes share it."""

    def __init__(
        self,
        pipe: Any,
        record: Record,
        settings: GenerationSettings,
        *,
        backend: str,
        lpips: bool,
        searched: Path | None,
        shard: Shard | None,
        progress: bool,
        say: Callable[[str], None],
    ) -> None:
        self.pipe, self.record, self.settings = pipe, record, settings
        self.backend, self.searched, self.shard = backend, searched, shard
        self.progress, self.say = progress, say
        self.images = makes_images(model_class(pipe))
        self.lpips = metrics.load_lpips(device_of(pipe)) if lpips else None
        if lpips and self.lpips is None:
            say("LPIPS needs the package lpips and its weights; pip install 'diffsparse[metrics]'")
        seeds = sorted({seed for _, seed in record.cases})
        first = [case for case, (_, seed) in enumerate(record.cases) if seed == seeds[0]]
        self.shown = set(first[:SHOWN])
        self._trajectory: Trajectory | None = None

    # -- dense -----------------------------------------------------------------------------------------------------

    def make_dense(self) -> None:
        """The dense clips that are not there yet, and how far apart two dense clips of one input are."""
        record, every = self.record, range(len(self.record.cases))
        order = self.shard.rotated(len(every)) if self.shard else list(every)
        todo = [case for case in order if not record.has_dense(case)]
        if todo:
            with self._enabled(preset("dense")), tqdm(todo, "dense", unit="clip", disable=not self.progress) as bar:
                run_warm_up(self.pipe, record.cases[0][0], self.settings)
                for case in bar:
                    if not record.has_dense(case):  # another shard may have made it by now
                        clip, figures = self._clip(case)
                        record.put_dense(case, clip, figures["attention_seconds"], self.shard is None)
        for case in sorted(self.shown):
            write_clip_picture(record.dense_clip(case).frames, self.picture("dense", case))
        if "trajectory" in record:
            self._trajectory = record.store.read_json("trajectory", Trajectory.from_dict)
        else:
            source, seed = record.cases[0]
            levels = record.dense_clip(0).noise_levels
            self._trajectory = find_trajectory(self.pipe, source, seed, self.settings, levels)
            record.put("trajectory", self._trajectory.to_dict())

    def measure_floor(self) -> None:
        """How far a dense clip of another seed is, and the same clip on another dense kernel."""
        record, cases = self.record, self.record.cases
        if "floor" in record:
            return
        by_input: dict[str, list[int]] = {}
        for case, (source, _) in enumerate(cases):
            by_input.setdefault(source.name, []).append(case)
        pairs = [pair for same in by_input.values() for pair in combinations(same, 2)]
        apart = [metrics.psnr(record.dense_clip(a).frames, record.dense_clip(b).frames) for a, b in pairs]
        (source, seed), first = cases[0], record.dense_clip(0).frames
        if not apart:
            other = generate_clip(self.pipe, source, max(s for _, s in cases) + 1, self.settings)
            apart = [metrics.psnr(other.frames, first)]
        with other_dense_kernel(device_of(self.pipe)) as kernel:
            again = generate_clip(self.pipe, source, seed, self.settings).frames
        floor = NoiseFloor(kernel, metrics.psnr(again, first), metrics.ssim(again, first))
        known = [value for value in apart if math.isfinite(value)]
        record.put(
            "floor", {"other_seed_psnr": math.fsum(known) / len(known) if known else None, "kernel": vars(floor)}
        )

    # -- plans -----------------------------------------------------------------------------------------------------

    def prepare(self, rows: Sequence[Row]) -> None:
        """What can be wrong with the machine and with given plans, before anything is generated.

        Raises :class:`BadInput`.
        """
        try:
            self._backend(preset("dense"))
        except ValueError as error:  # no backend runs here
            raise BadInput(str(error)) from None
        for row in rows:
            if row.kind == METHOD:
                continue
            known = self.record.get(f"row/{row.key}") or {}
            if row.kind == SEARCHED:
                source = str(self.searched.resolve()) if self.searched else ""
                if known.get("from", source) != source:
                    raise StoreMismatch(
                        f"{self.record.folder} holds plans from the search in {known['from']}; go on with that one, or "
                        "choose another --out"
                    )
                continue
            assert row.plan is not None
            check_plan_runs(row.plan, self.pipe, self._backend(row.plan))
            if known.get("digest", plan_digest(row.plan)) != plan_digest(row.plan):
                raise StoreMismatch(
                    f"{self.record.folder} holds clips of another plan by the name of {row.name}; rename the plan's "
                    "folder, or choose another --out"
                )

    def _plan(self, row: Row) -> tuple[SparsityPlan, dict[str, Any]]:
        """A row's plan and what is kept of it. Raises :class:`OutOfReach`."""
        if row.kind == PLAN:
            assert row.plan is not None
            return row.plan, {}
        if row.kind == SEARCHED:
            return self._composed(row)
        return self._fitted(row)

    def _composed(self, row: Row) -> tuple[SparsityPlan, dict[str, Any]]:
        assert self.searched is not None and row.asked is not None
        folder = self.record.folder / "plans" / row.key
        about = {"from": str(self.searched.resolve())}
        known = self.record.get(f"row/{row.key}") or {}
        if "digest" in known and (folder / JSON_NAME).is_file():
            kept = SparsityPlan.from_pretrained(folder)
            if plan_digest(kept) == known["digest"]:
                return kept, about
        plan: SparsityPlan | None = None
        for steps in (self.settings.num_inference_steps, None):
            try:
                # What is lacking without the model is told for whoever would use the plan unseen; here it is judged.
                plan = compose_plan(
                    self.searched, out=folder, density=row.asked, num_inference_steps=steps, progress=False
                )
                break
            except DiskFull:
                raise
            except BadInput as error:
                if steps is None:  # with the steps of the search, too
                    raise OutOfReach(str(error)) from None
        assert plan is not None
        try:
            check_plan_runs(plan, self.pipe, self._backend(plan))
        except BadInput as error:
            raise OutOfReach(str(error)) from None
        return plan, about

    def _fitted(self, row: Row) -> tuple[SparsityPlan, dict[str, Any]]:
        """The preset with the value of its knob that brings it to the density."""
        assert row.asked is not None and self._trajectory is not None
        knob, trajectory = knob_of(row.name), self._trajectory
        known = self.record.get(f"row/{row.key}") or {}
        if "options" in known:  # looked for before: going on would find another value
            plan = preset(row.name, images=self.images, **known["options"])
            if plan_digest(plan) == known["digest"]:
                kept = ("options", "expected_density", "forecast", "schedule")
                return plan, {name: known[name] for name in kept if name in known}
        schedule: dict[str, Any] = {}

        def plan_at(value: float) -> SparsityPlan:
            return preset(row.name, images=self.images, **schedule, **knob.options(value))

        first, more, name = plan_at(knob.high), {}, f"fit/{row.name}"
        if (dense := trajectory.dense_share(first)) > row.asked:
            schedule["sparse_below"] = trajectory.level_after(row.asked / 2)
            first, name = plan_at(knob.high), f"{name}/{schedule['sparse_below']:.4f}"
            cut = trajectory.dense_share(first)
            more["schedule"] = f"its dense steps alone take {dense:.3f} of the attention; cut to {cut:.3f}"
        cheap = trajectory.density(first) is not None
        tried = {float(value): float(density) for value, density in self.record.get(name, [])}

        def density_of(value: float) -> float:
            found = trajectory.density(plan_at(value)) if cheap else self._measure(plan_at(value))
            assert found is not None
            if not cheap:  # what took a generation is kept at once
                self.record.put(name, [*map(list, tried.items()), [value, found]])
            return found

        value, density = find_value(knob, row.asked, density_of, tried, cheap=cheap)
        options = {**schedule, **knob.options(value)}
        plan = plan_at(value)
        folder = self.record.folder / "plans" / row.key
        plan.save_pretrained(folder)
        return plan, {"options": options, "expected_density": density, "forecast": cheap, **more}

    def _measure(self, plan: SparsityPlan) -> float:
        """The whole-trajectory density of one generation, of the first case."""
        with self._enabled(plan):
            source, seed = self.record.cases[0]
            generate_clip(self.pipe, source, seed, self.settings)
            density = pipelines.sparse_attention_summary(self.pipe).density
        assert density is not None
        return density

    # -- rows ------------------------------------------------------------------------------------------------------

    def make_rows(self, rows: Sequence[Row]) -> None:
        """All clips of these rows that are not there yet. A row that fails keeps its reason, and the rest goes on."""
        todo = sum(len(self.record.missing(row.key)) for row in rows)
        with tqdm(total=todo, desc="compare", unit="clip", disable=not self.progress) as bar:
            for row in rows:
                missing = self.record.missing(row.key)
                known = self.record.get(f"row/{row.key}") or {}
                if not missing and "reason" not in known:
                    continue
                if row.kind == METHOD and known.get("state") == "out of reach":
                    continue  # looking for the density again would cost as many generations, and find no other
                bar.set_postfix_str(row.key)
                self._make_row(row, missing, bar)

    def _make_row(self, row: Row, missing: list[int], bar: Any) -> None:
        about: dict[str, Any] = {"name": row.name, "kind": row.kind, "asked": row.asked}
        try:
            plan, more = self._plan(row)
            about |= {**more, "digest": plan_digest(plan), "rules": [str(rule) for rule in plan.rules]}
            known = self.record.get(f"row/{row.key}") or {}
            if known.get("digest", about["digest"]) != about["digest"]:
                self.record.remove(f"clip/{row.key}/")  # of another plan by this name
                missing = self.record.missing(row.key)
            self.record.put(f"row/{row.key}", about)
            about |= self._make_clips(row, plan, missing, bar)
        except OutOfReach as error:
            about |= {"reason": str(error), "state": "out of reach"}
        except BadInput:  # files that cannot be written, a record that is damaged: that is no fault of the method
            raise
        except Exception as error:  # whatever a method raises is its row's reason
            about |= {"reason": f"{type(error).__name__}: {shorten(str(error), 300)}", "state": "failed"}
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        self.record.put(f"row/{row.key}", about)
        if "reason" in about:
            self.say(f"{row.key}: {about['reason']}")

    def _make_clips(self, row: Row, plan: SparsityPlan, missing: list[int], bar: Any) -> dict[str, Any]:
        with self._enabled(plan):
            if missing:
                run_warm_up(self.pipe, self.record.cases[0][0], self.settings)
            for case in missing:
                clip, figures = self._clip(case)
                report = clip_report(self.record.dense_clip(case), clip, None, self.lpips)
                if case in self.shown:
                    write_clip_picture(clip.frames, self.picture(row.key, case))
                self.record.put_clip(row.key, case, finite({**asdict(report), **figures}))
                bar.update()
            summary = pipelines.sparse_attention_summary(self.pipe)
        backends = sorted({name for t in summary.transformers.values() for name in t.backends})
        note = why_dense(summary)
        return ({"backends": backends} if backends else {}) | ({"note": note} if note else {})

    def time_rows(self, rows: Sequence[Row]) -> None:
        """One clip more of what was only made while other processes shared the machine, for its times."""
        record = self.record
        cases = range(len(record.cases))
        if "timed/dense" not in record and not any(record.dense_figures(case)["alone"] for case in cases):
            with self._enabled(preset("dense")):
                run_warm_up(self.pipe, record.cases[0][0], self.settings)
                record.put("timed/dense", self._clip(0)[1])
        for row in rows:
            about = record.get(f"row/{row.key}") or {}
            found = [clip for case in cases if (clip := record.clip(row.key, case)) is not None]
            if "reason" in about or not found or f"timed/{row.key}" in record or any(c["alone"] for c in found):
                continue
            plan, _ = self._plan(row)
            with self._enabled(plan):
                run_warm_up(self.pipe, record.cases[0][0], self.settings)
                record.put(f"timed/{row.key}", self._clip(0)[1])

    def measure_calls(self, rows: Sequence[Row]) -> None:
        """The relative errors of single calls, of rows that have clips; captured anew where a row lacks them."""
        record = self.record
        todo = [
            row
            for row in rows
            if f"calls/{row.key}" not in record and "reason" not in (record.get(f"row/{row.key}") or {"reason": ""})
        ]
        if not todo:
            return
        assert self._trajectory is not None
        device = device_of(self.pipe)
        source, seed = record.cases[0]
        captured = capture_calls(self.pipe, source, seed, self.settings, self._trajectory.levels, device)
        record.put("calls", [call.to_dict() for call in captured])
        for row in tqdm(todo, "calls", unit="row", disable=not self.progress):
            plan, _ = self._plan(row)
            try:
                found: Any = {"calls": finite(judge_calls(plan, captured, device, self._backend(plan)))}
            except Exception as error:  # as of a row's clips: whatever a method raises is its reason
                found = {"reason": f"{type(error).__name__}: {shorten(str(error), 300)}"}
            record.put(f"calls/{row.key}", found)

    # -- one clip --------------------------------------------------------------------------------------------------

    def picture(self, key: str, case: int) -> Path:
        """Where a clip's small picture is, without its ending."""
        return self.record.folder / "clips" / f"{key}-{case:04d}"

    def _backend(self, plan: SparsityPlan) -> str:
        # "auto" would leave layers dense where a table says that sparse attention is slower: nothing to compare then.
        return sparse_backend(self.pipe, plan) if self.backend == "auto" else self.backend

    @contextmanager
    def _enabled(self, plan: SparsityPlan) -> Iterator[None]:
        with pipelines.sparse_attention(self.pipe, plan, backend=self._backend(plan), timing=True):
            yield

    def _clip(self, case: int) -> tuple[Clip, dict[str, Any]]:
        """A clip under what is enabled, and what its attention did and took."""
        before, spent = self._so_far()
        source, seed = self.record.cases[case]
        clip = generate_clip(self.pipe, source, seed, self.settings)
        after, total = self._so_far()
        call, trajectory = after.since(before)
        attention, picking = (None if b is None else b - (a or 0.0) for a, b in zip(spent, total, strict=True))
        return clip, {
            "call_density": call,
            "density": trajectory,
            "loop_seconds": clip.loop_seconds,
            "seconds": clip.seconds,
            "attention_seconds": attention,
            "selection_seconds": picking,
            "alone": self.shard is None,
        }

    def _so_far(self) -> tuple[Any, tuple[float | None, float | None]]:
        summary = pipelines.sparse_attention_summary(self.pipe)
        ran = list(summary.transformers.values())
        times = [
            [value for t in ran if (value := getattr(t, name)) is not None] for name in ("seconds", "pick_seconds")
        ]
        attention, picking = (math.fsum(values) if values else None for values in times)
        return executed_work(summary), (attention, picking)
