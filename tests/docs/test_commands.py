"""Every command line in README, the pages and the cards is run, as small as it goes, or excused by name."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.commands import (
    EXCUSED,
    GPU_BENCHMARKS,
    PICTURES,
    PLAN_FOLDERS,
    PROGRAMS,
    PROMPT_FILES,
    all_commands,
    commands_in,
    excuse,
    is_quick,
    outputs,
    small,
)
from tests.docs.pages import ROOT
from tests.helpers.process import heed_ctrl_c
from tests.helpers.scripts import load_script

RUN = [line for line in all_commands() if excuse(line) is None]
BENCHMARKS = [line for line in all_commands() if line.startswith("python benchmarks/")]
SERVED = ("diffsparse demo", "python examples/gradio_demo.py")
#: What a command may read or write below the root.
COPIED = ("benchmarks", "diffsparse", "docs", "examples", "kernels", "pipelines", "search")
FILES = (
    *("Makefile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
    *("constraints.txt", "mkdocs.yml", "pyproject.toml"),
)


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is in the clone, so that a command that writes there leaves the clone alone."""
    root = tmp_path_factory.mktemp("clone")
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture
def place(clone: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder that looks like the clone's root, with prompts of a reader's own, and plans where none is to be made."""
    for path in clone.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for name in PROMPT_FILES:
        (tmp_path / name).write_text("a red circle moves to the right\na blue square moves down\n", "utf-8")
    words, _ = small(request.node.callspec.params["line"])
    model = PICTURES if PICTURES in words else "examples/tiny_wan"
    for name in PLAN_FOLDERS:
        if name not in outputs(words):
            shutil.copytree(ROOT / model / "sparse_plan", tmp_path / name)
    return tmp_path


def check_outputs(words: list[str], place: Path) -> None:
    for name in outputs(words):
        made = place / name
        files = [path for path in made.rglob("*") if path.is_file()] if made.is_dir() else [made]
        assert files and all(path.stat().st_size for path in files), f"{name} was not written"


@pytest.fixture
def run_here(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], str]:
    """Runs a line of ``diffsparse`` in this process, which has the libraries loaded; gives what it printed."""
    from diffsparse.search.cli import main

    def run(words: list[str]) -> str:
        monkeypatch.chdir(place)
        with pytest.raises(SystemExit) as end:
            main(words[1:])
        printed = capsys.readouterr()
        assert not end.value.code, printed.err
        assert "Traceback" not in printed.err
        return printed.out

    return run


@pytest.mark.parametrize("line", [line for line in RUN if is_quick(line)])
def test_quick_lines_run(line: str, place: Path, run_here: Callable[[list[str]], str]) -> None:
    words, into = small(line)
    printed = run_here(words)
    assert len(printed.splitlines()) > 3 or json.loads(printed)
    check_outputs(words, place)
    if into is not None:
        assert (ROOT / into).read_text("utf-8") == printed, f"{line} no longer makes the page that is kept"


@pytest.mark.parametrize("line", BENCHMARKS)
def test_benchmarks_understand_their_options(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of lines that are run nowhere but on a GPU, too."""
    words = shlex.split(line)
    module = load_script(ROOT / words[1])
    monkeypatch.setattr(sys, "argv", words[1:])
    module.arguments()
    monkeypatch.setattr(sys, "argv", [*words[1:], "--nope"])
    with pytest.raises(SystemExit) as end:
        module.arguments()
    assert end.value.code == 2


def program_of(words: list[str], place: Path) -> list[str]:
    """What the shell of a reader would run, without relying on what lies on ``PATH`` here."""
    if words[0] == "diffsparse":
        return [sys.executable, "-m", "diffsparse.search", *words[1:]]
    if words[0] == "python":
        return [sys.executable, *words[1:]]
    assert words[0] == "make", f"no rule runs {words[0]}; add one, or excuse the line in tests/docs/commands.py"
    stamp = place / ".stamp"  # newer than pyproject.toml, so that no environment is built
    stamp.touch()
    return ["make", f"BIN={Path(sys.executable).parent}", f"STAMP={stamp}", *words[1:]]


def start(words: list[str], place: Path) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PYTHONPATH", "MAKE", "MFLAGS"))}
    offline = {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "NO_COLOR": "1"}
    return subprocess.Popen(
        program_of(words, place),
        cwd=place,
        env={**kept, **offline, "PYTHONPATH": str(place)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed_ctrl_c,
    )


def is_served(line: str) -> bool:
    return line.startswith(SERVED)


@pytest.mark.slow(reason="searches, evaluations, benchmarks and scripts, though small ones")
@pytest.mark.parametrize("line", [line for line in RUN if not is_quick(line) and not is_served(line)])
def test_lines_run(line: str, place: Path, run_here: Callable[[list[str]], str]) -> None:
    words, into = small(line)
    assert into is None, "no rule sends the output of such a line to a file"
    if words[0] == "diffsparse":
        if "--from" in words:  # the record of a search
            folder = words[words.index("--from") + 1]
            shutil.rmtree(place / folder)
            run_here(small(f"diffsparse search MODEL --prompts prompts.txt --out {folder}")[0])
        run_here(words)
        check_outputs(words, place)
        return
    running = start(words, place)
    try:
        printed, _ = running.communicate(timeout=600)
    finally:
        running.kill()
    assert running.returncode == 0, printed
    assert "Traceback" not in printed
    check_outputs(words, place)


@pytest.mark.slow(reason="starts the demo, libraries and all")
@pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio (the extra demo)")
@pytest.mark.parametrize("line", [line for line in RUN if is_served(line)])
def test_lines_that_serve_a_page_run(line: str, place: Path) -> None:
    """Until the page answers; ended by Ctrl-C, as a reader would."""
    words, _ = small(line)
    if "--port" in words:  # another one may be running on the page's
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            words[words.index("--port") + 1] = str(free.getsockname()[1])
    running = start(words, place)
    try:
        assert running.stdout is not None
        told = []
        for text in running.stdout:
            told.append(text)
            if text.startswith("the demo is at "):
                break
        assert told and told[-1].startswith("the demo is at "), told
        address = told[-1].split()[4]
        if "--port" in words:
            assert address.endswith(f":{words[words.index('--port') + 1]}/")
        with urllib.request.urlopen(address, timeout=60) as page:
            assert b"gradio" in page.read()
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130


# -- nothing is left out -----------------------------------------------------------------------------------------------


def test_every_excuse_is_of_a_line_that_is_there() -> None:
    assert not [line for line in EXCUSED if line not in all_commands()]
    assert all(len(reason) > 10 for reason in (*EXCUSED.values(), *GPU_BENCHMARKS.values()))
    for script in GPU_BENCHMARKS:
        assert any(line.startswith(f"python {script} ") and excuse(line) for line in BENCHMARKS)
    assert excuse("python benchmarks/pipeline.py --models wan-14b-720p --settings 0.9") is not None
    assert excuse("python benchmarks/pipeline.py --tiny") is None


def test_every_line_is_run_or_excused() -> None:
    """One of the tests above takes each line, and none takes a program that it has no rule for."""
    runs = [shlex.split(line)[0] for line in RUN]
    assert set(runs) <= {"diffsparse", "python", "make"}, "excuse the line in tests/docs/commands.py, with a reason"
    assert {"diffsparse", "python", "make"} <= set(runs) and len(RUN) > 30


def test_a_new_line_is_found_wherever_it_stands() -> None:
    text = (
        "Run `diffsparse eval` or `diffsparse show --png`, not `diffsparse search | eval`; `diffsparse.kernels` is a "
        "module.\nTry `make new` and `diffsparse show plan --nope`.\n\n"
        "```bash\ndiffsparse search MODEL \\\n  --out plan  # a comment\n# only a comment\n```\n\n"
        "```text\nmake no\n```\n\n```\naccelerate launch x.py\n```\n\n```python\nprint()\n```\n"
    )
    assert commands_in(text) == [
        "diffsparse search MODEL --out plan",
        "accelerate launch x.py",
        "make new",
        "diffsparse show plan --nope",
    ]
    assert {shlex.split(line)[0] for line in all_commands()} == set(PROGRAMS)


@pytest.mark.parametrize("line", ["diffsparse show plan --png plan.png"])
def test_a_file_that_was_not_written_is_found(line: str, place: Path) -> None:
    words, _ = small(line)
    assert outputs(words) == ["plan.png"]
    with pytest.raises((AssertionError, FileNotFoundError)):
        check_outputs(words, place)
    (place / "plan.png").write_bytes(b"")
    with pytest.raises(AssertionError, match=r"plan\.png was not written"):
        check_outputs(words, place)
