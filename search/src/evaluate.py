"""A plan against dense attention, clip by clip: same prompt, same seed, same noise.

Dense clips are the costly part and do not depend on the plan, so they are made once (:func:`generate_dense`) and any
number of plans is compared with them (:func:`compare`). ``diffsparse.evaluate_plan`` does both for one plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch

from diffsparse import pipelines
from diffsparse.pipelines.policy import DENSE_ENTRIES, NOT_IN_PLAN, OUTSIDE
from diffsparse.plan import SparsityPlan
from diffsparse.search import metrics
from diffsparse.search.clip_report import ClipReport, clip_report
from diffsparse.search.errors import BadInput
from diffsparse.search.executed import executed_work
from diffsparse.search.generate import Clip, GenerationSettings, check_seeds, generate_clip, generate_clips
from diffsparse.search.inputs import GenerationInput, as_input, as_inputs, check_inputs
from diffsparse.search.shortened import steps_to_ask
from diffsparse.search.statistics import Mean, mean_of
from diffsparse.search.verdict import verdict

__all__ = [
    "DenseSet",
    "EvalReport",
    "NoiseFloor",
    "check_plan",
    "compare",
    "device_of",
    "finite",
    "generate_dense",
    "other_dense_kernel",
    "paired",
    "run_warm_up",
    "why_dense",
]

#: Reasons for dense calls that are the plan's own.
PLANNED = (OUTSIDE, DENSE_ENTRIES, NOT_IN_PLAN)
#: Steps of the generation that is thrown away before times are taken (kernels compile, memory is fetched).
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class NoiseFloor:
    """The first dense clip again, on another dense kernel: no sparse plan can be told from dense beyond this."""

    kernel: str
    psnr: float
    ssim: float | None


@dataclass(frozen=True, eq=False)
class DenseSet:
    """Dense clips to compare plans with.

    ``clips``: by (input's name, seed), in the order of generation. ``other_seed_psnr``: mean PSNR between two dense
    clips of the same input and different seeds, the distance that "a different clip" has.
    """

    clips: dict[tuple[str, int], Clip]
    settings: GenerationSettings
    other_seed_psnr: float | None
    noise_floor: NoiseFloor | None

    @property
    def noise_levels(self) -> tuple[float, ...]:
        return next(iter(self.clips.values())).noise_levels


@dataclass(frozen=True)
class EvalReport:
    """What :func:`compare` found.

    ``sparse_clips`` and ``dense`` hold the clips themselves and are left out of :meth:`to_dict`.
    """

    plan: str
    clips: list[ClipReport]
    settings: GenerationSettings
    call_density: float | None
    trajectory_density: float | None
    other_seed_psnr: float | None
    noise_floor: NoiseFloor | None
    attention: dict[str, Any]
    notes: list[str]
    environment: dict[str, Any]
    sparse_clips: list[Clip] = field(default_factory=list, repr=False, compare=False)
    dense: DenseSet | None = field(default=None, repr=False, compare=False)

    @property
    def psnr(self) -> Mean | None:
        """To the dense clips, in dB; None where no clip has one."""
        return mean_of([c.psnr for c in self.clips])

    @property
    def above_other_seed(self) -> Mean | None:
        """How much more PSNR that is than another seed's clip has, in dB."""
        return mean_of([c.above_other_seed for c in self.clips])

    @property
    def ssim(self) -> Mean | None:
        """To the dense clips; None where the pictures are too small."""
        return mean_of([c.ssim for c in self.clips])

    @property
    def lpips(self) -> Mean | None:
        """To the dense clips; None where it was not computed."""
        return mean_of([c.lpips for c in self.clips])

    @property
    def worst(self) -> ClipReport:
        """The clip with the lowest PSNR; one without any (NaN) is worse still."""
        return min(self.clips, key=lambda c: -math.inf if math.isnan(c.psnr) else c.psnr)

    def _total(self, name: str) -> float:
        return math.fsum(getattr(c, name) for c in self.clips)

    @property
    def loop_speedup(self) -> float | None:
        """Dense over sparse time of the denoising loops, summed over all clips."""
        sparse = self._total("sparse_loop_seconds")
        return self._total("dense_loop_seconds") / sparse if sparse else None

    @property
    def speedup(self) -> float | None:
        """The same for whole calls: text encoding and decoding included."""
        sparse = self._total("sparse_seconds")
        return self._total("dense_seconds") / sparse if sparse else None

    @property
    def broken(self) -> list[str]:
        """A line for each black, flat, frozen or NaN clip."""
        return [
            f"{side} clip of {c.prompt!r}, seed {c.seed}: {', '.join(found)}"
            for c in self.clips
            for side, found in (("dense", c.dense_defects), ("sparse", c.sparse_defects))
            if found
        ]

    @property
    def passed(self) -> bool:
        """True where no clip is broken."""
        return not self.broken

    @property
    def verdict(self) -> str:
        """One sentence: would somebody see it?"""
        return verdict(self.clips, bool(self.broken))

    @property
    def border_error(self) -> float | None:
        """Mean over the clips; None where no clip has one."""
        return _mean_known([c.border_error for c in self.clips])

    @property
    def last_frame_error(self) -> float | None:
        """Mean over the clips; None where no clip has one."""
        return _mean_known([c.last_frame_error for c in self.clips])

    @property
    def frame_errors(self) -> list[float] | None:
        """Mean squared error of every frame over the clips; None where it is of no number, or was not measured."""
        found = [c.frame_errors for c in self.clips if c.frame_errors is not None]
        if not found or len({len(errors) for errors in found}) > 1:
            return None
        means = [math.fsum(errors) / len(found) for errors in zip(*found, strict=True)]
        return means if all(math.isfinite(mean) for mean in means) else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: no NaN and no infinity (None instead)."""
        means = {
            name: value.to_dict() if (value := getattr(self, name)) else None
            for name in ("psnr", "above_other_seed", "ssim", "lpips")
        }
        clips = [
            {**vars(c), "loop_speedup": c.loop_speedup, "psnr": c.psnr if math.isfinite(c.psnr) else None}
            for c in self.clips
        ]
        n = len(self.clips)
        return finite(
            {
                "plan": self.plan,
                "passed": self.passed,
                "broken": self.broken,
                **means,
                "verdict": self.verdict,
                "border_error": self.border_error,
                "last_frame_error": self.last_frame_error,
                "frame_errors": self.frame_errors,
                "worst": {"prompt": self.worst.prompt, "seed": self.worst.seed, "psnr": self.worst.psnr},
                "other_seed_psnr": self.other_seed_psnr,
                "noise_floor": vars(self.noise_floor) if self.noise_floor else None,
                "call_density": self.call_density,
                "trajectory_density": self.trajectory_density,
                "loop_seconds": {
                    "dense": self._total("dense_loop_seconds") / n,
                    "sparse": self._total("sparse_loop_seconds") / n,
                    "speedup": self.loop_speedup,
                },
                "seconds": {
                    "dense": self._total("dense_seconds") / n,
                    "sparse": self._total("sparse_seconds") / n,
                    "speedup": self.speedup,
                },
                "settings": vars(self.settings),
                "clips": clips,
                "attention": self.attention,
                "notes": self.notes,
                "environment": self.environment,
            }
        )

    def table(self, clips: bool = True) -> str:
        """The same for readers, in plain text; ``clips`` lists them one by one."""
        from diffsparse.search.tables import eval_table

        return eval_table(self, clips)


def _mean_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def finite(value: Any) -> Any:
    """As JSON values: no NaN and no infinity (None instead)."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# -- dense -------------------------------------------------------------------------------------------------------------


@contextmanager
def other_dense_kernel(device: torch.device) -> Iterator[str]:
    """Another exact attention than the default: memory-efficient on a GPU, the plain formula elsewhere."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = SDPBackend.EFFICIENT_ATTENTION if device.type == "cuda" else SDPBackend.MATH
    # Text encoders' masked calls are not for every kernel: what the wanted one refuses takes the plain formula.
    with sdpa_kernel(list(dict.fromkeys([backend, SDPBackend.MATH])), set_priority=True):
        yield f"torch SDPA, {backend.name.lower()}"


def device_of(pipe: Any) -> torch.device:
    """Where the pipeline runs, also where its models are kept elsewhere between calls."""
    return torch.device(getattr(pipe, "_execution_device", pipe.device))


def run_warm_up(pipe: Any, prompt: GenerationInput, settings: GenerationSettings) -> None:
    """A short generation whose output is not used: it compiles kernels, allocates memory and builds layouts."""
    steps = steps_to_ask(pipe, as_input(prompt), WARM_UP_STEPS)
    generate_clip(pipe, prompt, 0, settings.brief(pipe, steps))


def generate_dense(
    pipe: Any,
    prompts: Sequence[GenerationInput],
    seeds: Sequence[int],
    settings: GenerationSettings,
    *,
    noise_floor: bool = True,
    other_seed: bool = True,
    warm_up: bool = True,
    progress: bool = True,
) -> DenseSet:
    """The dense clips of every prompt, or other input, with every seed.

    ``noise_floor`` makes the first clip again on another dense kernel. ``other_seed`` gives the PSNR between two seeds;
    with a single seed that takes one more clip of the first prompt. ``warm_up`` first makes two steps that are not
    timed. Sparse attention must be off.
    """
    inputs, settings = as_inputs(prompts), settings.resolved(pipe)
    seeds = check_seeds(seeds)
    if not inputs:
        raise BadInput("there is no prompt to generate")
    check_inputs(pipe, inputs)
    if warm_up:
        run_warm_up(pipe, inputs[0], settings)
    made = generate_clips(pipe, inputs, seeds, settings, label="dense", progress=progress)
    clips = {(c.prompt, c.seed): c for c in made}
    pairs = [(clips[i.name, a], clips[i.name, b]) for i in inputs for a, b in combinations(seeds, 2)]
    if other_seed and not pairs:
        pairs = [(made[0], generate_clip(pipe, inputs[0], seeds[0] + 1, settings))]
    apart = mean_of([metrics.psnr(a.frames, b.frames) for a, b in pairs]) if other_seed else None
    floor = None
    if noise_floor:
        with other_dense_kernel(device_of(pipe)) as kernel:
            again = generate_clip(pipe, inputs[0], seeds[0], settings).frames
        floor = NoiseFloor(kernel, metrics.psnr(again, made[0].frames), metrics.ssim(again, made[0].frames))
    return DenseSet(clips, settings, apart.mean if apart else None, floor)


# -- sparse ------------------------------------------------------------------------------------------------------------


def check_plan(pipe: Any, plan: SparsityPlan | str, backend: str = "auto") -> None:
    """Enables the plan and disables it again. Raises what ``enable_sparse_attention`` raises."""
    with pipelines.sparse_attention(pipe, plan, backend=backend):
        pass


def _plan_name(plan: SparsityPlan | str) -> str:
    if isinstance(plan, str):
        return plan
    return str(plan.record.get("preset") or plan.record.get("name") or "plan")


def compare(
    pipe: Any,
    plan: SparsityPlan | str,
    dense: DenseSet,
    *,
    backend: str = "auto",
    name: str | None = None,
    lpips: bool = False,
    warm_up: bool = True,
    progress: bool = True,
) -> EvalReport:
    """Generates every clip of ``dense`` again under ``plan`` and compares.

    ``warm_up`` first makes two steps that are not timed. ``lpips`` adds LPIPS where the package and its weights are
    here. The pipeline is dense again afterwards.
    """
    from tqdm import tqdm

    from diffsparse.search.environment import environment

    notes: list[str] = []
    sparse: list[Clip] = []
    first = next(iter(dense.clips.values()))
    with pipelines.sparse_attention(pipe, plan, backend=backend):
        if warm_up:
            run_warm_up(pipe, first.made_from, dense.settings)
        before = executed_work(pipelines.sparse_attention_summary(pipe))
        label = name or _plan_name(plan)
        with tqdm(dense.clips, desc=f"sparse ({label})", unit="clip", disable=not progress, leave=False) as bar:
            sparse.extend(generate_clip(pipe, dense.clips[at].made_from, at[1], dense.settings) for at in bar)
        summary = pipelines.sparse_attention_summary(pipe)
    model = metrics.load_lpips(device_of(pipe)) if lpips else None
    if lpips and model is None:
        notes.append("LPIPS needs the package lpips and its weights; pip install 'diffsparse[metrics]'")
    reports = [
        clip_report(twin, clip, dense.other_seed_psnr, model)
        for twin, clip in zip(dense.clips.values(), sparse, strict=True)
    ]
    call, trajectory = executed_work(summary).since(before)
    if reasons := why_dense(summary):
        notes.append(reasons)
    return EvalReport(
        plan=label,
        clips=reports,
        settings=dense.settings,
        call_density=call,
        trajectory_density=trajectory,
        other_seed_psnr=dense.other_seed_psnr,
        noise_floor=dense.noise_floor,
        attention=summary.to_dict(),
        notes=notes,
        environment=environment(device_of(pipe)),
        sparse_clips=sparse,
    )


def why_dense(summary: pipelines.SparseSummary) -> str | None:
    """What ran dense though the plan has it sparse, in one line."""
    reasons: dict[str, int] = {}
    for transformer in summary.transformers.values():
        for reason, count in transformer.dense_reasons.items():
            if reason in PLANNED:
                continue
            reasons[reason] = reasons.get(reason, 0) + count
    if not reasons:
        return None
    return "calls that ran dense (warm-up included): " + "; ".join(f"{n} x {reason}" for reason, n in reasons.items())


def paired(a: EvalReport, b: EvalReport, value: Callable[[ClipReport], float | None] = lambda c: c.psnr) -> Mean | None:
    """Mean of ``a - b`` over the clips that both have: is plan a better than plan b?

    Its interval is there from six clips on.
    """
    theirs = {(c.prompt, c.seed): value(c) for c in b.clips}
    differences = []
    for clip in a.clips:
        mine, other = value(clip), theirs.get((clip.prompt, clip.seed))
        if mine is not None and other is not None:
            differences.append(mine - other)
    return mean_of(differences)
