"""Every command line that the documents show: found, and made small enough to be run here."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import typer

from diffsparse.search.cli import app
from tests.docs.pages import FENCE, ROOT, documents

#: What a documented command begins with.
PROGRAMS = ("accelerate", "diffsparse", "git", "make", "pip", "python")
#: Commands of ``diffsparse`` that generate nothing and measure nothing: run by ``make test``.
QUICK = ("env", "explain", "models", "show")

TRAINED = "trains for minutes on two GPUs; tests/examples/test_tiny_wan.py runs the script with --smoke"
TRAINED_PICTURES = "trains for minutes on a GPU; tests/examples/test_tiny_flux.py runs the script with --smoke"
MANY_CLIPS = (
    "a dozen plans, each on several whole clips; tests/search/test_quality_benchmark.py runs the script on a tiny model"
)
INSTALLS = "installs packages from the network; tests/house/test_wheel.py builds the wheel and installs it without one"
IS_A_TEST = "runs the tests, this one too"
#: Scripts that time a GPU: their lines are not run, but each script reads its options (tests/docs/test_commands.py).
GPU_BENCHMARKS = {
    "benchmarks/kernels.py": "times the kernels of a GPU; tests/kernels/test_bench.py runs the script on the CPU",
    "benchmarks/numerics.py": (
        "needs a Hopper GPU; tests/kernels/test_numerics_benchmark.py runs its parts on the CPU"
    ),
    "benchmarks/search.py": (
        "searches models of real size on a GPU; tests/search/test_search_benchmark.py runs the script on small ones"
    ),
    "benchmarks/online.py": (
        "times rules at real size on a GPU; tests/kernels/test_online_benchmark.py runs the script on the CPU"
    ),
    "benchmarks/pipeline.py": (
        "times steps of large models on a GPU; tests/search/test_pipeline_benchmark.py runs the script with --tiny"
    ),
}
#: The other lines that are not run, each with its reason. Everything else is.
EXCUSED = {
    (
        "diffsparse compare examples/tiny_wan --methods online,sol,sparsepr,sla,subblock,sparsed,adaspa,draft,blade,"
        "svg,radial,xattention,sparge,vmoba,sta,hip --prompts heldout6.txt --seeds 2 --height 128 --width 128 "
        "--num-frames 17 --guidance-scale 5 --steps 20 --densities .25 --from record --device cuda "
        "--out comparison"
    ): "takes minutes on a GPU; tests/search/test_compare.py runs the command on a small pipeline",
    (
        "diffsparse search examples/tiny_wan --prompts examples/tiny_wan/prompts/calibration.txt --height 128 "
        "--width 128 --num-frames 17 --guidance-scale 5 --steps 20 --density .25 --repair-rows 64 --out record"
    ): "takes ten minutes; README has a shorter search of the same model, which is run",
    "accelerate launch --multi_gpu --num_processes 2 --mixed_precision bf16 examples/train_tiny_wan.py "
    "--out out/tiny_wan --vae-minutes 3.2 --vae-batch 8 --vae-lr 0.0012 --ema 0.998 --pool-minutes 0.25 "
    "--minutes 4.45": TRAINED,
    "accelerate launch --multi_gpu --num_processes 2 --mixed_precision bf16 examples/train_tiny_wan.py "
    "--out out/tiny_wan_2 --start-from out/tiny_wan/model --minutes 7.5 --pool-minutes 0.4 --pool-clips 24576 "
    "--check-minutes 3 --ema 0.999 --shift 1": TRAINED,
    "accelerate launch --num_processes 1 --mixed_precision bf16 examples/train_tiny_flux.py --out out/tiny_flux "
    "--vae-minutes 1.5 --pool-minutes 0.6 --minutes 9": TRAINED_PICTURES,
    "git config --global core.symlinks true": "changes the settings of whoever runs the tests",
    "git config core.symlinks true": "changes the settings of the clone that the tests run in",
    "make PYTHON=python3.12 venv": INSTALLS,
    "make venv": INSTALLS,
    "make demo": "searches for minutes; tests/search/test_demo.py runs the script that it calls",
    "make format": "rewrites the clone; `make test` begins with `make lint`, which calls the same programs",
    "make lint": "what `make test` begins with",
    "make test": IS_A_TEST,
    "make test 'ARGS=tests/house -k wheel'": IS_A_TEST,
    "make test-diffusers-latest": INSTALLS,
    "make test-gpu PYTHON=python3": "needs a GPU, and runs the tests",
    "make test-slow": IS_A_TEST,
    "python benchmarks/kernels.py --backends cpu --densities 0.3,0.7 --tokens 5120 --heads 4 --head-dim 64": (
        "a minute of dense attention on a CPU; tests/kernels/test_bench.py runs the script on less"
    ),
    "python benchmarks/cpu.py --rounds 21": (
        "a minute of attention on a CPU; tests/kernels/test_cpu_benchmark.py runs the script on less"
    ),
    "python benchmarks/loop.py examples/tiny_wan examples/tiny_wan/sparse_plan --prompts "
    "examples/tiny_wan/prompts/heldout.txt --count 3": "whole clips again and again at full size, minutes on a CPU",
    "python benchmarks/quality.py examples/tiny_wan examples/tiny_wan/sparse_plan --prompts "
    "examples/tiny_wan/prompts/heldout.txt --count 12 --seeds 2": MANY_CLIPS,
    "python benchmarks/quality.py examples/tiny_wan examples/tiny_wan/sparse_plan --prompts "
    "examples/tiny_wan/prompts/heldout.txt --count 3 --seeds 2": MANY_CLIPS,
    "python examples/check_clips.py examples/tiny_wan --out out/tiny_wan_check": (
        "minutes on a CPU however few its captions; tests/examples/test_tiny_wan.py tests what it measures with"
    ),
    "python examples/check_pictures.py examples/tiny_flux --out out/tiny_flux_check": (
        "minutes on a CPU; tests/examples/test_tiny_flux.py tests what it measures with"
    ),
    "pip install .": INSTALLS,
    "pip install '.[demo]'": INSTALLS,
    "pip install '.[dev]'": INSTALLS,
    "pip install '.[docs]'": INSTALLS,
    "pip install '.[metrics]'": INSTALLS,
    "pip install '.[viz]'": INSTALLS,
    "pip install '.[xformers]'": INSTALLS,
}

PICTURES = "examples/tiny_flux"
PICTURE = ("--height", "64", "--width", "64", "--steps", "2", "--prompts", "prompts.txt")
CLIP = ("--height", "32", "--width", "48", "--num-frames", "5", "--steps", "2")
#: What makes a command small: options that are put behind its own, of which the last one counts.
SMALL: dict[tuple[str, ...], tuple[str, ...]] = {
    ("diffsparse", "search", PICTURES): (
        *(*PICTURE, "--trace-prompts", "1", "--samples", "2", "--validate", "0", "--device", "cpu"),
    ),
    ("diffsparse", "eval", PICTURES): (*PICTURE, "--seeds", "1", "--no-lpips", "--device", "cpu"),
    ("diffsparse", "search", "--from"): (),  # of the size that was searched
    ("diffsparse", "search"): (*CLIP, "--trace-prompts", "1", "--samples", "2", "--validate", "0", "--device", "cpu"),
    ("diffsparse", "eval"): (*CLIP, "--seeds", "1", "--no-lpips", "--device", "cpu"),
    ("diffsparse", "compare"): (
        *(*CLIP, "--methods", "subblock", "--densities", ".7", "--seeds", "1", "--no-lpips", "--device", "cpu"),
    ),
    ("diffsparse", "bench", "kernels"): ("--grid", "2,8,8", "--heads", "1", "--head-dim", "32", "--device", "cpu"),
    ("diffsparse", "bench", "break-even"): (
        *("--tokens", "256,512", "--heads", "1", "--head-dim", "32", "--device", "cpu", "--out", "break_even.json"),
    ),
    ("diffsparse", "explain", "plan", "--height"): ("--height", "128", "--width", "128", "--num-frames", "17"),
    ("diffsparse", "demo"): ("--device", "cpu"),
    ("make", "docs"): ("ARGS=--site-dir site",),
}
#: What stands for a reader's own things: the bundled model, its plan, prompts, a size in latent tokens.
STAND_INS = {
    "MODEL": "examples/tiny_wan",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "examples/tiny_wan",
    "T,H,W": "5,16,16",
}
#: Named alone (``diffsparse show --png``), they need a value to be part of a line.
OPTIONS_WITH_A_VALUE = ("--png", "--html", "--out")
PROMPT_FILES = ("prompts.txt", "held_out.txt")
PLAN_FOLDERS = ("plan", "my_plan")
#: Options that name a file or a folder which is there afterwards.
WRITES = ("--out", "--png", "--html", "--csv", "--plot", "--json")


def written() -> list[Path]:
    """The documents, the rooms' own READMEs, and the cards of the models and plans in ``examples``."""
    rooms = [ROOT / room / "README.md" for room in ("diffsparse", "kernels", "pipelines", "search")]
    return [*documents(), *rooms, *sorted((ROOT / "examples").rglob("README.md"))]


@functools.cache
def subcommands() -> frozenset[str]:
    """``search``, ``bench``, ``kernels``, ...: the words that choose what ``diffsparse`` does."""

    def names(command: Any) -> set[str]:
        inner = getattr(command, "commands", {})
        return set(inner).union(*(names(child) for child in inner.values()))

    return frozenset(names(typer.main.get_command(app)))


def is_name(words: list[str]) -> bool:
    """Whether a span only names a command, some of them, or one's option: ``diffsparse show --png``.

    Commands that need nothing further (``diffsparse env``) are lines, not names.
    """
    if words[0] != "diffsparse" or words[1:] in (["env"], ["models"], ["demo"]):
        return False
    *inner, last = words[1:]
    return set(inner) <= subcommands() | {"|"} and (last in subcommands() or last in OPTIONS_WITH_A_VALUE)


def commands_in(text: str) -> list[str]:
    """Command lines of fenced blocks (unnamed, ``bash``, ``sh``) and of code spans, as ``shlex.join`` writes them."""
    found = []
    for language, body in FENCE.findall(text):
        if language in ("", "bash", "sh", "console"):
            for line in body.replace("\\\n", " ").splitlines():
                if words := shlex.split(line.removeprefix("$ "), comments=True):
                    found.append(words)
    for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)):
        program, _, rest = span.partition(" ")
        if program in PROGRAMS and rest.strip():
            words = shlex.split(span)
            if not is_name(words):
                found.append(words)
    return [shlex.join(words) for words in found]


def all_commands() -> list[str]:
    """Every distinct line of every document, in order."""
    return list(dict.fromkeys(line for path in written() for line in commands_in(path.read_text("utf-8"))))


def excuse(line: str) -> str | None:
    """Why a line is not run, if it is not."""
    words = shlex.split(line)
    for script, reason in GPU_BENCHMARKS.items():
        if words[:2] == ["python", script] and not {"--tiny", "cpu"} & set(words):
            return reason
    return EXCUSED.get(line)


def is_quick(line: str) -> bool:
    words = shlex.split(line)
    return words[0] == "diffsparse" and words[1] in QUICK


def small(line: str) -> tuple[list[str], str | None]:
    """The words to run in a reader's place, and the file that ``>`` sends the output to."""
    words = [STAND_INS.get(word, word) for word in shlex.split(line)]
    into = None
    if ">" in words:
        words, into = words[: words.index(">")], words[words.index(">") + 1]
    for begin, more in SMALL.items():
        if tuple(words[: len(begin)]) == begin:
            if begin[:2] == ("diffsparse", "search"):
                # Of so few tokens and steps there are no cheaper plans than these.
                more = (*more, "--density" if "--density" in words else "--budget", "1")
            return words + list(more), into
    return words, into


def outputs(words: list[str]) -> list[str]:
    """Files and folders that the words say will be written; the last of each option counts."""
    named = {a: b for a, b in zip(words, words[1:], strict=False) if a in WRITES and not b.startswith("-")}
    return list(named.values())
