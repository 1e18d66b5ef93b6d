"""The model of a demo, one for all users, and the checks of what they ask of it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffsparse.grid import TokenGrid
from diffsparse.pipelines import architecture_of, find_transformers
from diffsparse.pipelines.resolve import PLAN_FOLDER, makes_images
from diffsparse.plan import JSON_NAME, SparsityPlan
from diffsparse.preset_plans import preset
from diffsparse.search import load
from diffsparse.search.demo.inspector import PlanView, check_blocks
from diffsparse.search.demo.sessions import Session
from diffsparse.search.demo.upload import read_uploaded_plan
from diffsparse.search.errors import BadInput
from diffsparse.search.generate import GenerationSettings
from diffsparse.search.recorded import recorded
from diffsparse.search.signature import check_generates, parameters

__all__ = [
    "CONSERVATIVE",
    "DEFAULT_DENSITY",
    "RADIAL",
    "SEARCHED_HERE",
    "SHIPPED",
    "UPLOADED",
    "WINDOW",
    "Studio",
]

SHIPPED, CONSERVATIVE, WINDOW, RADIAL = "searched", "conservative", "window", "radial"
UPLOADED, SEARCHED_HERE = "uploaded", "searched here"
#: The parameter of each ready-made plan that the density slider moves, from the sparsest to the densest.
WINDOW_SIZES = tuple(round(0.05 * i, 2) for i in range(1, 21))
RADIAL_DECAYS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
DEFAULT_DENSITY = 0.4
MAX_STEPS = 100
MAX_PROMPT = 2000
MAX_SEED = 2**32 - 1
#: Tokens of one generation: beyond, a few clicks would keep the machine busy for hours.
MAX_TOKENS = {"cpu": 20_000, "cuda": 200_000}


def _prompts_of(model: str, name: str) -> list[str]:
    """Prompts that lie with the model; none where it has no file of them."""
    file = Path(model) / "prompts" / f"{name}.txt"
    return load.read_prompts(file)[:6] if file.is_file() else []


@dataclass(eq=False)
class Studio:
    """The pipeline, its name, and what fits it.

    ``lock`` is held while the model runs: one generation at a time, for a plan is attached to the model itself.
    """

    pipe: Any
    name: str
    examples: Sequence[str] = ()
    calibration: Sequence[str] = ()
    shipped: PlanView | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, model: str, device: str = "auto", dtype: str = "auto") -> Studio:
        """Load a model's folder or Hub id. Raises :class:`BadInput`."""
        load.check_model_name(model)
        place = load.choose_device(device)
        precision = load.choose_dtype(dtype, place)
        load.quiet_libraries()
        pipe = load.load_pipeline(model, device=place, dtype=precision)
        check_generates(pipe)
        if "num_inference_steps" not in parameters(pipe):
            raise BadInput(
                f"{type(pipe).__name__} takes no num_inference_steps, which the demo asks for; name another model"
            )
        name = Path(model).name if Path(model).is_dir() else model
        studio = cls(pipe, name, _prompts_of(model, "heldout"), _prompts_of(model, "calibration"))
        folder = Path(model) / PLAN_FOLDER
        if (folder / JSON_NAME).is_file():
            plan = load.load_plan(str(folder))
            load.check_plan_fits(plan, pipe)
            studio.shipped = PlanView.of(plan, "the plan that the model ships", folder)
        return studio

    # -- what the page offers --------------------------------------------------------------------------------------

    @property
    def plans(self) -> list[str]:
        """The choices of a plan, the best first."""
        return [*([SHIPPED] if self.shipped else []), CONSERVATIVE, WINDOW, RADIAL, SEARCHED_HERE, UPLOADED]

    @property
    def is_video(self) -> bool:
        return load.shape_rule(self.pipe).frames is not None

    def takes(self, argument: str) -> bool:
        """Has the pipeline's call an argument of this name?"""
        return argument in parameters(self.pipe)

    def defaults(self) -> GenerationSettings:
        """What the shipped plan was searched with; else the pipeline's own steps, guidance and size."""
        found = recorded(self.shipped.plan.record) if self.shipped else {}
        values = {"num_inference_steps" if name == "steps" else name: value for name, value in found.items()}
        known = parameters(self.pipe)
        return GenerationSettings(**{n: v for n, v in values.items() if n in known}).resolved(self.pipe)

    def grid(self, settings: GenerationSettings) -> TokenGrid | None:
        """Visual tokens of one clip, where its size is known; text tokens are left out."""
        if settings.height is None or settings.width is None:
            return None
        architecture = architecture_of(next(iter(find_transformers(self.pipe).values())))
        t, h, w = architecture.patch_size

        def factor(*names: str) -> int:
            return next((int(v) for n in names if (v := getattr(self.pipe, n, None)) is not None), 1)

        spatial = factor("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
        frames = 1
        if self.is_video:
            if settings.num_frames is None:
                return None
            temporal = factor("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
            frames = -(-((settings.num_frames - 1) // temporal + 1) // t)
        return TokenGrid(frames, settings.height // (spatial * h), settings.width // (spatial * w))

    def trajectory(self, steps: int) -> tuple[list[float], bool]:
        """Noise levels of the steps, and whether they are the scheduler's own (else they are spread evenly).

        Schedulers whose levels depend on the picture's size tell none without one.
        """
        scheduler = copy.deepcopy(self.pipe.scheduler)
        try:
            scheduler.set_timesteps(steps)
        except ValueError:
            return np.linspace(1, 0, steps, endpoint=False).tolist(), False
        levels = scheduler.timesteps.double() / scheduler.config.num_train_timesteps
        return levels.clamp(0, 1).tolist(), True

    # -- checks ----------------------------------------------------------------------------------------------------

    def settings(
        self, steps: Any, guidance: Any = None, height: Any = None, width: Any = None, num_frames: Any = None
    ) -> GenerationSettings:
        """What a user asked for, checked. Raises :class:`BadInput` with what is allowed."""
        known = self.defaults()

        def pick(value: Any, default: Any) -> Any:
            return default if value is None else value

        count = _whole("the number of steps", steps, 1, MAX_STEPS)
        scale = pick(guidance, known.guidance_scale)
        number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if scale is not None and not (number and 0 <= scale <= 50):
            raise BadInput(f"guidance must be a number from 0 to 50, got {scale!r}")
        sizes: dict[str, Any] = {}
        asked = {"height": height, "width": width, **({"num_frames": num_frames} if self.is_video else {})}
        for name, value in asked.items():
            value = pick(value, getattr(known, name))
            sizes[name] = None if value is None else _whole(name.replace("_", " "), value, 1, 16_384)
        try:
            load.check_shape(self.pipe, sizes["height"], sizes["width"], sizes.get("num_frames"))
        except BadInput as error:  # it speaks of options of the command line
            raise BadInput(str(error).replace("--num-frames", "frames:").replace("--", "")) from None
        scale = None if scale is None else float(scale)
        settings = GenerationSettings(count, scale, **sizes, true_cfg_scale=known.true_cfg_scale)
        settings.arguments(self.pipe)
        grid = self.grid(settings)
        limit = MAX_TOKENS["cuda" if self.pipe.device.type == "cuda" else "cpu"]
        if grid is not None and grid.num_visual > limit:
            raise BadInput(
                f"{grid.num_visual:,} tokens ({grid}) are more than this demo takes on {self.pipe.device.type} "
                f"({limit:,}); ask for fewer frames or a smaller picture"
            )
        return settings

    def prompt(self, text: Any) -> str:
        """A prompt, checked. Raises :class:`BadInput`."""
        if not isinstance(text, str) or not text.strip():
            raise BadInput("the prompt is empty; write what the clip should show, or take one of the examples")
        if len(text) > MAX_PROMPT:
            raise BadInput(f"the prompt has {len(text):,} characters; at most {MAX_PROMPT:,} are taken")
        return " ".join(text.split())

    def seed(self, value: Any) -> int:
        """A seed, checked. Raises :class:`BadInput`."""
        return _whole("the seed", value, 0, MAX_SEED)

    def plan(self, choice: Any, density: Any, session: Session, settings: GenerationSettings) -> SparsityPlan:
        """The chosen plan; the ready-made ones at the density (of a sparse call) nearest to the one asked for."""
        if choice == SHIPPED and self.shipped is not None:
            return self.shipped.plan
        if choice == CONSERVATIVE:
            return preset(CONSERVATIVE)
        if choice == UPLOADED:
            if session.uploaded is None:
                raise BadInput("no plan was uploaded yet; upload the zip of a plan's folder, or choose another plan")
            if (grid := self.grid(settings)) is not None:
                check_blocks(session.uploaded.plan, grid)
            return session.uploaded.plan
        if choice == SEARCHED_HERE:
            if session.searched is None:
                raise BadInput(
                    "no search has ended on this page yet; run one in the tab Search, or choose another plan"
                )
            return session.searched.plan
        if choice in (WINDOW, RADIAL):
            if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
                raise BadInput(f"the density is a share above 0 and at most 1, got {density!r}")
            return self._at_density(choice, float(density), settings)
        raise BadInput(f"no plan {str(choice)[:40]!r}; choose one of {', '.join(self.plans)}")

    def _at_density(self, name: str, density: float, settings: GenerationSettings) -> SparsityPlan:
        grid = self.grid(settings)
        if grid is None:
            raise BadInput("give height, width and frames: the density of a plan depends on them")
        if name == WINDOW:
            tried = [preset(WINDOW, size=(size, size, size)) for size in WINDOW_SIZES]
        else:
            images = makes_images(load.model_class(self.pipe), grid)
            tried = [preset(RADIAL, images=images, decay=decay) for decay in RADIAL_DECAYS]
        return min(tried, key=lambda plan: abs(float(plan.call_densities(grid).mean()) - density))

    def take_upload(self, file: Path, session: Session) -> PlanView:
        """A plan's zip becomes the session's uploaded plan. Raises :class:`BadInput`; an earlier upload then stays."""
        folder = session.new_folder()
        plan = read_uploaded_plan(file, folder)
        load.check_plan_fits(plan, self.pipe)
        try:
            session.uploaded = PlanView.of(plan, "the uploaded plan", folder, self.grid(self.defaults()))
        except BadInput as error:  # it may name a file by its path here
            raise BadInput(str(error).replace(f"{folder}/", "")) from error
        return session.uploaded

    def view(self, choice: Any, session: Session) -> PlanView:
        """A plan to look into, by the same names as :meth:`plan`. Raises :class:`BadInput`."""
        if choice == SHIPPED and self.shipped is not None:
            return self.shipped
        if choice == UPLOADED and session.uploaded is not None:
            return session.uploaded
        if choice == SEARCHED_HERE and session.searched is not None:
            return session.searched
        settings = self.defaults()
        plan = self.plan(choice, DEFAULT_DENSITY, session, settings)
        return PlanView.of(plan, f"the ready-made plan {choice!r}", None, self.grid(settings))


def _whole(what: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or value % 1:
        raise BadInput(f"{what} must be a whole number from {low:,} to {high:,}, got {value!r}")
    if not low <= value <= high:
        raise BadInput(f"{what} must be from {low:,} to {high:,}, got {value:,}")
    return int(value)
