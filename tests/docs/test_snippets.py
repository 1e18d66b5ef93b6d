"""Python in README and the pages is run; command lines are read by their program (test_commands.py runs them)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.docs.pages import ROOT, blocks, command_lines, documents, name
from tests.search.plans import make_plan
from tests.search.tiny import build_pipeline

#: Pages whose Python takes several processes: tests/pipelines/test_parallel.py runs it.
SHARED = ("docs/gpus.md",)
PYTHON_PAGES = [path for path in documents() if blocks(path, "python") and name(path) not in SHARED]
COMMAND_PAGES = [path for path in documents() if command_lines(path)]
#: Snippets that compile models.
SLOW = ("docs/compile.md",)
#: No clip of a snippet gets larger or longer than this, whatever it asks for.
LARGEST = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2}


def _smaller(call: Callable[..., Any]) -> Callable[..., Any]:
    known = inspect.signature(call).parameters

    @functools.wraps(call)  # keeps the signature, which the library reads
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        for option, most in LARGEST.items():
            if option in known:
                kwargs[option] = min(kwargs.get(option) or most, most)
        return call(self, *args, **kwargs)

    return generate


@pytest.fixture
def _known_tails() -> Iterator[None]:
    """A tail that a snippet registers is forgotten after it."""
    from diffsparse.tails import TAIL_COST

    before = dict(TAIL_COST)
    yield
    TAIL_COST.clear()
    TAIL_COST.update(before)


@pytest.fixture
def place(_known_tails: None, no_more_rules: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what snippets name, in which ``cuda`` is the CPU and other models are tiny random ones."""
    from diffusers import DiffusionPipeline, FluxPipeline, WanPipeline

    from diffsparse.kernels import tails
    from diffsparse.kernels.backends import registry as backends
    from diffsparse.patterns import registry
    from diffsparse.pipelines import family
    from diffsparse.search import api

    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    make_plan().save_pretrained(tmp_path / "plan")
    # Snippets that register a family or a pattern leave none behind.
    monkeypatch.setattr(family, "_FAMILIES", dict(family._FAMILIES))
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))
    monkeypatch.setattr(tails, "_TAILS", dict(tails._TAILS))
    load, to = DiffusionPipeline.from_pretrained.__func__, DiffusionPipeline.to

    def from_pretrained(cls: type, model: str, *args: Any, **kwargs: Any) -> Any:
        if Path(model).is_dir():
            pipe = load(cls, model, *args, **kwargs)
            pipe.set_progress_bar_config(disable=True)
            return pipe
        assert cls is WanPipeline, f"there is no tiny {cls.__name__} to stand in for {model}"
        pipe = build_pipeline()
        for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
            part.to(kwargs.get("dtype") or kwargs.get("torch_dtype") or torch.float32)
        return pipe

    def on_the_cpu(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self if args == ("cuda",) else to(self, *args, **kwargs)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(DiffusionPipeline, "to", on_the_cpu)
    for cls in (WanPipeline, FluxPipeline):
        monkeypatch.setattr(cls, "__call__", _smaller(cls.__call__))
    settings = api.asked_settings

    def small_settings(*args: Any, **kwargs: Any) -> Any:
        found = settings(*args, **kwargs)
        return replace(found, **{n: min(getattr(found, n) or most, most) for n, most in LARGEST.items()})

    monkeypatch.setattr(api, "asked_settings", small_settings)
    return tmp_path


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            p, id=name(p), marks=[pytest.mark.slow(reason="the page compiles a model")] if name(p) in SLOW else []
        )
        for p in PYTHON_PAGES
    ],
)
def test_python_runs(path: Path, place: Path) -> None:
    """Each page's blocks, one after the other, in one namespace."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(path, "python"):
        # As a user's file: without what this one imports from __future__.
        exec(compile(block, name(path), "exec", dont_inherit=True), namespace)


@pytest.fixture(scope="module")
def parse() -> Callable[[list[str]], dict[str, Any]]:
    """Reads a command line as the program does, without doing anything; returns the command's arguments."""
    import typer

    from diffsparse.search.cli import app

    seen: list[dict[str, Any]] = []

    def record(**arguments: Any) -> None:
        seen.append(arguments)

    def replace(command: Any) -> None:
        children = getattr(command, "commands", None)
        for child in (children or {}).values():
            replace(child)
        if not children:
            command.callback = record

    group = typer.main.get_command(app)
    replace(group)

    def parse(arguments: list[str]) -> dict[str, Any]:
        seen.clear()
        group.main(arguments, prog_name="diffsparse", standalone_mode=False)
        (found,) = seen
        return found

    return parse


@pytest.mark.parametrize("path", COMMAND_PAGES, ids=name)
def test_command_lines(path: Path, parse: Callable[[list[str]], dict[str, Any]]) -> None:
    for program, *arguments in command_lines(path):
        if program == "diffsparse":
            assert isinstance(parse(arguments), dict), arguments
        elif program == "python":
            assert (ROOT / arguments[0]).is_file(), arguments
        else:
            assert program in ("make", "pip", "git"), f"{program} {arguments}"


def test_a_wrong_command_line_is_found(parse: Callable[[list[str]], dict[str, Any]]) -> None:
    assert parse(["show", "plan", "--grid", "5,32,32"])["grid"] == "5,32,32"
    with pytest.raises(Exception, match="--no-such-option"):
        parse(["show", "plan", "--no-such-option"])


def test_pages_with_snippets_are_found() -> None:
    assert {"README.md", "docs/quickstart.md", *SLOW} <= {name(path) for path in PYTHON_PAGES}
    assert "README.md" in {name(path) for path in COMMAND_PAGES}
