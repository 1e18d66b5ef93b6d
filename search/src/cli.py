"""The command ``diffsparse``. Everything heavy is imported inside the commands, so that ``--help`` comes at once."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any, NoReturn

import typer

from diffsparse.search.errors import BadInput

__all__ = ["app", "main"]

app = typer.Typer(
    name="diffsparse",
    help="Sparse attention for diffusion transformers: search a plan, check it, look at it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench_app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        from diffsparse import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A diffusers pipeline: a local folder or a Hub id.")]
Plan = Annotated[
    str,
    typer.Argument(metavar="PLAN", help="A plan's folder, a Hub repository, or dense, window, radial or conservative."),
]
Prompts = Annotated[str, typer.Option("--prompts", metavar="FILE", help="A text file with one prompt a line.")]
Height = Annotated[int | None, typer.Option("--height", help="In pixels.")]
Width = Annotated[int | None, typer.Option("--width", help="In pixels.")]
Frames = Annotated[int | None, typer.Option("--num-frames", help="Frames of a clip.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps.  [default: the pipeline's own number]")]
Guidance = Annotated[
    float | None, typer.Option("--guidance-scale", help="Guidance.  [default: the pipeline's own scale]")
]
TrueCfg = Annotated[
    float | None,
    typer.Option("--true-cfg-scale", help="The same for Flux and Qwen-Image, which call it so; above 1 it guides."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (bfloat16 on a GPU), float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and everything else to stderr.")]

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
#: Seeds are numbers of 64 bits; the commands count on from the one that is given.
MAX_OPTION_SEED = 2**62


@contextmanager
def _answers(as_json: bool) -> Iterator[Callable[[dict[str, Any], str], None]]:
    """Gives ``print(data, text)``: the one thing that reaches stdout. Whatever libraries print goes to stderr."""
    stdout = sys.stdout

    def answer(data: dict[str, Any], text: str) -> None:
        print(json.dumps(data, allow_nan=False, ensure_ascii=False) if as_json else text, file=stdout, flush=True)

    with redirect_stdout(sys.stderr):
        yield answer


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _stop(text: str, code: int) -> NoReturn:
    _say(" ".join(text.split()))
    raise SystemExit(code)


def _interruptible(resume: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Ctrl-C ends a command with one line that says how to go on."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            try:
                command(*args, **kwargs)
            except KeyboardInterrupt:
                _stop(f"interrupted: {resume}", INTERRUPTED)

        return wrapped

    return decorate


def _settings(pipe: Any, record: dict[str, Any], asked: dict[str, Any]) -> Any:
    """What was asked for; else what the plan was searched with; else None, which is the pipeline's own.

    ``asked``: values of options by their names, None where one was not given. What only the plan's record says, and
    this pipeline does not take, is left out.
    """
    from diffsparse.search.generate import GenerationSettings
    from diffsparse.search.load import check_shape
    from diffsparse.search.recorded import recorded_value
    from diffsparse.search.signature import check_generates, parameters

    check_generates(pipe)
    known, values = parameters(pipe), {}
    for option, value in asked.items():
        argument = "num_inference_steps" if option == "steps" else option
        if value is None and argument in known:
            value = recorded_value(record, option)
        values[argument] = value
    settings = GenerationSettings(**values)
    check_shape(pipe, settings.height, settings.width, settings.num_frames)
    settings.arguments(pipe)
    return settings


def _check_numbers(**values: int | float | None) -> None:
    """``steps``, ``seed`` and the like, before anything is loaded."""
    for name, value in values.items():
        option = "--" + name.replace("_", "-")
        least = 0 if name in ("seed", "first_seed", "guidance_scale", "true_cfg_scale", "validate") else 1
        if value is not None and not value >= least:
            raise BadInput(f"{option} {value}: it must be at least {least}")
        if value is not None and name in ("seed", "first_seed") and value > MAX_OPTION_SEED:
            raise BadInput(f"{option} {str(value)[:40]}: it must be at most {MAX_OPTION_SEED}")


def _check_share(option: str, value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise BadInput(f"{option} {value}: it is a share of dense attention, above 0 and at most 1, for example 0.4")


@app.command("search")
@_interruptible("what was found is kept; run the same command again to go on from there")
def search_command(
    model: Model,
    prompts: Prompts,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where the plan and the search's record go.")],
    budget: Annotated[
        float | None, typer.Option("--budget", help="Share of the dense attention time to use.  [default: 0.4]")
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Whole-trajectory density to use, instead of --budget.")
    ] = None,
    height: Height = None,
    width: Width = None,
    num_frames: Frames = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    true_cfg_scale: TrueCfg = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the noise and of every random choice.")] = 0,
    validate: Annotated[
        int,
        typer.Option("--validate", help="Prompts on which whole generations choose among the best few plans; 0: none."),
    ] = 1,
    trace_prompts: Annotated[
        int | None,
        typer.Option(
            "--trace-prompts",
            help="Prompts to measure attention on: more make masks carry over better.  [default: 4 on a GPU, else 2]",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", help="Queries measured of every block of queries.  [default: 12 on a GPU, else 4]"),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Search a sparsity plan for a model, measured on a few prompts and on this machine.

    It prints how long it will take before it starts. Killed or interrupted, the same command goes on where it was.

    \b
    Example:
      diffsparse search Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --out plan --budget 0.4
    """
    with _answers(as_json) as answer:
        if budget is not None and density is not None:
            raise BadInput(f"--budget {budget} and --density {density}: give one of the two")
        _check_share("--budget", budget)
        _check_share("--density", density)
        _check_numbers(height=height, width=width, num_frames=num_frames, steps=steps, seed=seed, validate=validate)
        _check_numbers(guidance_scale=guidance_scale, true_cfg_scale=true_cfg_scale)
        _check_numbers(trace_prompts=trace_prompts, samples=samples)
        from diffsparse.search import load

        found = load.read_prompts(prompts)
        load.check_model_name(model)
        place = load.choose_device(device)
        precision = load.choose_dtype(dtype, place)
        folder = load.check_output(out)
        from diffsparse.search.search import SearchConfig, search_plan, thoroughness

        load.quiet_libraries()
        pipe = load.load_pipeline(model, device=place, dtype=precision)
        asked: dict[str, Any] = {"height": height, "width": width, "num_frames": num_frames, "steps": steps}
        asked |= {"guidance_scale": guidance_scale, "true_cfg_scale": true_cfg_scale}
        settings = _settings(pipe, {}, asked)
        config = SearchConfig(
            budget=None if density is not None else (0.4 if budget is None else budget),
            density=density,
            height=settings.height,
            width=settings.width,
            num_frames=settings.num_frames,
            steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            true_cfg_scale=settings.true_cfg_scale,
            seed=seed,
            validation_prompts=validate,
            **thoroughness(place, trace_prompts, samples),
        )
        plan = search_plan(pipe, found, config, folder, say=_say)
        from diffsparse.search.measured import figures_beside
        from diffsparse.search.show import describe, grid_of, plan_table

        on, figures = grid_of(plan, folder), figures_beside(plan, folder)
        answer(
            {"plan": str(folder), **describe(plan, on, figures)},
            f"{plan_table(plan, on, figures)}\n\n"
            f"The plan is in {folder}. Check it on prompts that the search did not see:\n"
            f"  diffsparse eval {model} {folder} --prompts FILE",
        )


@app.command("eval")
@_interruptible("nothing was written; run the command again, with fewer prompts if it takes too long")
def eval_command(
    model: Model,
    plan: Plan,
    prompts: Prompts,
    seeds: Annotated[int, typer.Option("--seeds", help="Clips of each prompt, each with a seed of its own.")] = 2,
    first_seed: Annotated[int, typer.Option("--first-seed", help="The first of the seeds.")] = 1000,
    height: Height = None,
    width: Width = None,
    num_frames: Frames = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    true_cfg_scale: TrueCfg = None,
    lpips: Annotated[bool, typer.Option("--lpips/--no-lpips", help="LPIPS too, where it is installed.")] = True,
    backend: Annotated[str, typer.Option("--backend", help="Attention backend: auto, or a name of `env`.")] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Write eval.json, a contact sheet and videos there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a plan with dense attention, clip by clip, with the same seeds.

    Sizes, steps and guidance are those that the plan was searched with, unless given. Exit code 1 where a clip is
    black, flat, frozen or not a number.

    \b
    Example:
      diffsparse eval Wan-AI/Wan2.1-T2V-1.3B-Diffusers plan --prompts held_out.txt --seeds 2 --out report
    """
    with _answers(as_json) as answer:
        _check_numbers(seeds=seeds, first_seed=first_seed, steps=steps)
        _check_numbers(height=height, width=width, num_frames=num_frames)
        _check_numbers(guidance_scale=guidance_scale, true_cfg_scale=true_cfg_scale)
        from diffsparse.search import load

        found = load.read_prompts(prompts)
        load.check_model_name(model)
        chosen = load.load_plan(plan)
        place = load.choose_device(device)
        precision = load.choose_dtype(dtype, place)
        load.check_backend(backend)
        folder = load.check_output(out) if out else None
        load.quiet_libraries()
        pipe = load.load_pipeline(model, device=place, dtype=precision)
        chosen = load.load_plan(plan, load.model_class(pipe)) if plan in load.PRESETS else chosen
        load.check_plan_runs(chosen, pipe, backend)
        asked: dict[str, Any] = {"height": height, "width": width, "num_frames": num_frames, "steps": steps}
        asked |= {"guidance_scale": guidance_scale, "true_cfg_scale": true_cfg_scale}
        settings = _settings(pipe, chosen.record, asked)
        from diffsparse.search.evaluate import compare, generate_dense

        _say(f"{len(found)} prompts x {seeds} seeds: {len(found) * seeds} clips dense, then as many sparse")
        dense = generate_dense(pipe, found, range(first_seed, first_seed + seeds), settings)
        report = compare(pipe, chosen, dense, backend=backend, name=plan, lpips=lpips)
        data = report.to_dict()
        text = report.table()
        if folder is not None:
            from diffsparse.search.report import write_report

            try:
                data["files"] = [str(p) for p in write_report(folder, report, dense)]
            except BadInput:
                answer(data, text)  # what was measured is not lost with the files
                raise
            text += "\n\nwritten: " + ", ".join(data["files"])
        answer(data, text)
        if not report.passed:
            _stop(f"failed: {report.broken[0]}" + (f", and {n} more" if (n := len(report.broken) - 1) else ""), FAILED)


@app.command("show")
@_interruptible("nothing was written")
def show_command(
    plan: Plan,
    grid: Annotated[
        str | None, typer.Option("--grid", metavar="T,H,W", help="Latent tokens to show the plan on.")
    ] = None,
    png: Annotated[str | None, typer.Option("--png", metavar="FILE", help="Draw every layer and head.")] = None,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="Write one page to look at every head in a browser.")
    ] = None,
    phase: Annotated[
        int | None, typer.Option("--phase", help="Draw this phase only, or open the page at it; counted from 0.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a plan does, layer by layer, and draw it.

    \b
    Example:
      diffsparse show plan --grid 21,30,52 --png plan.png --html plan.html
    """
    terminal = sys.stdout.isatty() and not as_json
    with _answers(as_json) as answer:
        from diffsparse.search import load
        from diffsparse.search.measured import figures_beside
        from diffsparse.search.show import describe, draw, grid_of, parse_grid, plan_table

        given = parse_grid(grid) if grid else None
        chosen = load.load_plan(plan, grid=given)
        folder = None if plan in load.PRESETS else plan
        on = given or grid_of(chosen, folder)
        if phase is not None and not 0 <= phase < chosen.schedule.num_phases:
            raise BadInput(f"--phase {phase}: the plan has phases 0 to {chosen.schedule.num_phases - 1}")
        figures = figures_beside(chosen, folder, on)
        data, text = describe(chosen, on, figures), plan_table(chosen, on, figures, styled=terminal)
        if png is not None:
            data["png"] = str(draw(chosen, on, png, folder=folder, phase=phase))
            text += f"\n\nwritten: {png}"
        if html is not None:
            from diffsparse.search.html import write_html

            data["html"] = str(write_html(chosen, on, html, folder=folder, phase=phase))
            text += f"\n\nwritten: {html}"
        answer(data, text)


@app.command("explain")
@_interruptible("nothing was written")
def explain_command(
    plan: Plan,
    height: Height = None,
    width: Width = None,
    num_frames: Frames = None,
    model_shape: Annotated[
        str | None,
        typer.Option(
            "--model-shape", metavar="MODEL", help="A model's folder or a transformer class: what a token covers."
        ),
    ] = None,
    grid: Annotated[
        str | None, typer.Option("--grid", metavar="T,H,W", help="Latent tokens, instead of a size in pixels.")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", help="Attention backend: auto, or a name of `env`.")] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Say what a plan would do at a size on this machine, layer by layer, before anything is generated.

    Which kernel runs, density, predicted time, what stays dense and why, which heads run their fallback. Without a
    size it is the one that the plan was searched with. No weights are read.

    \b
    Example:
      diffsparse explain plan --height 480 --width 832 --num-frames 81
    """
    with _answers(as_json) as answer:
        _check_numbers(height=height, width=width, num_frames=num_frames)
        from diffsparse.search import load
        from diffsparse.search.explain import explain, explain_table, shape_for
        from diffsparse.search.show import parse_grid

        chosen = load.load_plan(plan)
        place = load.choose_device(device)
        load.check_backend(backend)
        shape = shape_for(
            chosen,
            folder=None if plan in load.PRESETS else plan,
            grid=parse_grid(grid) if grid else None,
            model_shape=model_shape,
            height=height,
            width=width,
            num_frames=num_frames,
        )
        if plan in load.PRESETS:
            named = shape.architecture.model_class if shape.architecture else model_shape
            chosen = load.load_plan(plan, named, shape.grid)
        found = explain(
            chosen,
            shape,
            device=place,
            dtype=load.choose_dtype(dtype, place),
            backend=backend,
            model_class=model_shape,
        )
        answer({"plan": plan, **found.to_dict()}, explain_table(found, plan))


@bench_app.command("kernels")
@_interruptible("nothing was written")
def bench_kernels_command(
    grid: Annotated[str, typer.Option("--grid", metavar="T,H,W", help="Latent tokens of one call.")] = "5,32,32",
    heads: Annotated[int, typer.Option("--heads")] = 4,
    head_dim: Annotated[int, typer.Option("--head-dim")] = 64,
    density: Annotated[str, typer.Option("--density", help="Kept blocks, a list.")] = "0.1,0.3,0.5,0.7,1.0",
    block_size: Annotated[int, typer.Option("--block-size", help="64 or 128.")] = 64,
    tail: Annotated[str, typer.Option("--tail", help="none, mean, moments or centroids.")] = "moments",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Time every attention backend against the fastest dense attention of torch.

    \b
    Example:
      diffsparse bench kernels --grid 21,30,52 --heads 12 --head-dim 128 --device cuda
    """
    with _answers(as_json) as answer:
        _check_numbers(heads=heads, head_dim=head_dim)
        from diffsparse.search import load
        from diffsparse.search.bench import bench_kernels, bench_table, parse_densities
        from diffsparse.search.show import parse_grid

        place = load.choose_device(device)
        result = bench_kernels(
            parse_grid(grid),
            heads=heads,
            head_dim=head_dim,
            densities=parse_densities(density),
            block_size=block_size,
            tail=tail,
            device=place,
            dtype=load.choose_dtype(dtype, place),
        )
        answer(result, bench_table(result))


@bench_app.command("break-even")
@_interruptible("nothing was written")
def bench_break_even_command(
    heads: Annotated[int, typer.Option("--heads")] = 24,
    head_dim: Annotated[int, typer.Option("--head-dim")] = 128,
    block_size: Annotated[int, typer.Option("--block-size", help="64 or 128.")] = 128,
    tokens: Annotated[str, typer.Option("--tokens", help="Sequence lengths, a rising list.")] = "",
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="Write the table here, not to the cache.")] = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure from which length and density on sparse attention pays, and keep it for `backend="auto"`.

    \b
    Example:
      diffsparse bench break-even --heads 24 --head-dim 128
    """
    with _answers(as_json) as answer:
        _check_numbers(heads=heads, head_dim=head_dim)
        from diffsparse.search import load
        from diffsparse.search.break_even import bench_break_even, break_even_text

        place = load.choose_device(device)
        table, path = bench_break_even(
            place,
            heads=heads,
            head_dim=head_dim,
            dtype=load.choose_dtype(dtype, place),
            block_size=block_size,
            tokens=tokens,
            out=out,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        answer({**table.to_dict(), "file": str(path)}, break_even_text(table, path))


@app.command("env")
def env_command(as_json: Json = False) -> None:
    """Versions, devices and attention backends, to paste into an issue.

    \b
    Example:
      diffsparse env
    """
    with _answers(as_json) as answer:
        from diffsparse.search.environment import full_environment
        from diffsparse.search.tables import environment_table

        found = full_environment()
        answer(found, environment_table(found))


@app.command("models")
def models_command(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The page docs/models.md.")] = False,
    as_json: Json = False,
) -> None:
    """The models that a plan can be attached to, and what of them stays dense.

    \b
    Example:
      diffsparse models
    """
    if as_markdown and as_json:
        raise BadInput("--markdown and --json are two different answers; give one of them")
    with _answers(as_json) as answer:
        from diffsparse.search.tables import models_data, models_table

        if as_markdown:
            from diffsparse.pipelines.matrix import markdown

            answer({}, markdown().rstrip("\n"))
        else:
            answer(models_data(), models_table())


@app.command("demo")
@_interruptible("the demo has ended")
def demo_command(
    model: Annotated[
        str | None,
        typer.Option("--model", help="A pipeline's folder or Hub id.  [default: the small model of the clone]"),
    ] = None,
    port: Annotated[int | None, typer.Option("--port", help="[default: the first free one from 7860 on]")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Generate dense and sparse side by side in a browser, and look into plans. On this machine only.

    \b
    Example:
      diffsparse demo --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    """
    from diffsparse.search.demo.launch import serve

    serve(model, port, device=device, dtype=dtype, say=_say)


# Typer carries its own copy of click in some versions and uses the package in others; the base class is the same one.
_ClickException: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main(arguments: list[str] | None = None) -> NoReturn:
    """The console script. Exit codes: 0; 1: an evaluation failed; 2: input that cannot work; 130: Ctrl-C."""
    try:
        code = app(arguments, prog_name="diffsparse", standalone_mode=False)
    except BadInput as error:
        _stop(f"error: {error}", BAD_INPUT)
    except OSError as error:
        from diffsparse.saving import is_full

        if not is_full(error):
            raise
        where = f" {error.filename}" if error.filename else ""
        _stop(
            f"error: the disk is full: no room to write{where}; make room there, then run the command again", BAD_INPUT
        )
    except _ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "diffsparse"
        message = error.format_message()  # type: ignore[attr-defined]
        if type(error).__name__ == "NoArgsIsHelpError":  # the message is the help
            _say(message)
            raise SystemExit(BAD_INPUT) from None
        _stop(f"error: {message.rstrip('.')}; see `{command} --help`", BAD_INPUT)
    except typer.Abort:
        _stop("interrupted", INTERRUPTED)
    raise SystemExit(code if isinstance(code, int) else 0)
