"""Tables fit the terminal, and nothing that a cell says is lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from rich.cells import cell_len

from diffsparse.search.columns import GLUE, fold, shorten, terminal_width, text_table
from diffsparse.search.tables import eval_table
from tests.search.evaluations import PROMPT, clip, report

WIDTHS = (24, 40, 60, 80, 144)
LAYERS = [f"single_transformer_blocks.{i}.attn.processor" for i in (3, 12)]


def widest(text: str) -> int:
    return max(cell_len(line) for line in text.splitlines())


def letters(text: str) -> Counter[str]:
    """What is said, without how it is laid out: a cell that is folded has those of its neighbours between its lines."""
    return Counter(re.sub(r"[\s\-|:]", "", text))


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    rows = [[str(i), name, "2 none, 1 moments, 1 centroids", "0.764", PROMPT] for i, name in enumerate(LAYERS)]
    header = ["phase", "layer", "tails", "density", "what was seen"]
    named, bare = text_table(rows, header, right=[0, 3], width=width), text_table(rows, width=width)
    for text in (named, bare):
        assert widest(text) <= width, text
        assert letters("".join(map("".join, rows))) <= letters(text), "something is lost"
    styled = text_table(rows, header, right=[0, 3], styles=["dim", "bold", "cyan"], width=width)
    assert re.sub(r"\x1b\[[0-9;]*m", "", styled) == named


@pytest.mark.parametrize("width", [60, 80, 144])
@pytest.mark.parametrize("lpips", [None, 0.1])
def test_an_evaluation_fits(width: int, lpips: float | None) -> None:
    found = report([clip(seed, 20.0 + seed, lpips) for seed in range(7)])
    text = eval_table(found, width=width)
    assert widest(text) <= width, text
    assert all(f"{c.psnr:.2f}" in text for c in found.clips)
    assert letters(shorten(PROMPT, 110)) <= letters(text)


@pytest.mark.parametrize(("count", "interval"), [(1, False), (2, False), (5, False), (6, True)])
def test_few_clips_are_shown_and_have_no_interval(count: int, interval: bool) -> None:
    psnr = [20.0 + 3 * seed for seed in range(count)]
    text = eval_table(report([clip(seed, value) for seed, value in enumerate(psnr)]), clips=False, width=144)
    (line,) = (line for line in text.splitlines() if line.startswith("PSNR to dense"))
    assert ("95%" in text) is interval
    if count == 1:
        assert line.endswith(" 20.00 dB")
    elif not interval:
        assert line.endswith(f" dB  ({count} clips: {', '.join(f'{value:.2f}' for value in psnr)})")


def test_a_table_that_fits_is_left_alone() -> None:
    assert text_table([["a", "-"], ["b", "-"]], ["x", "nothing"], width=24) == "x  nothing\n-  -------\na  -\nb  -"


def test_a_column_that_says_nothing_goes_first() -> None:
    rows = [["a" * 20, "-", "0.5 0.6"], ["b", "-", "0.7"]]
    text = text_table(rows, ["layer", "dense because", "density"], width=30)
    assert "dense because" not in text and "a" * 20 in text and "0.5 0.6" in text
    assert "dense because" in text_table(rows, ["layer", "dense because", "density"], width=80)


@pytest.mark.parametrize("width", [44, 60, 80, 144])
def test_names_stay_whole(width: int) -> None:
    """A layer's name can be searched for and copied, in a terminal of any width."""
    rows = [[str(phase), name, "2 none, 1 moments, 1 centroids", "0.764"] for name in LAYERS for phase in range(2)]
    text = text_table(rows, ["phase", "layer", "tails", "density"], right=[0, 3], names=1, width=width)
    assert widest(text) <= width
    assert letters("".join(map("".join, rows))) - letters("".join(LAYERS)) <= letters(text)
    for name in LAYERS:
        # Beside its rows, or once above them.
        assert sum(name in line for line in text.splitlines()) in (1, 2), text
    styled = text_table(
        rows, ["phase", "layer", "tails", "density"], right=[0, 3], names=1, width=width, styles=["", "bold", "", ""]
    )
    assert re.sub(r"\x1b\[[0-9;]*m", "", styled) == text


def test_where_words_are_broken() -> None:
    """Behind punctuation and before capitals, and what belongs together stays so where it can."""
    rows = [["single_transformer_blocks.12.attn", "HunyuanVideoTransformer3DModel", "word " * 10]]
    first = [line.split("  ")[0].strip() for line in text_table(rows, ["a", "b", "c"], width=60).splitlines()[2:]]
    assert "".join(first) == rows[0][0] and first[0] == "single_transformer_"
    assert "HunyuanVideo " in text_table(rows, ["a", "b", "c"], width=60)
    counts = ", ".join(f"{n}{GLUE}{name}" for n, name in ((2, "none"), (13, "moments"), (1, "mean")))
    assert fold(counts, 20).splitlines() == ["2 none, 13 moments,", "1 mean"]
    assert fold(counts, 10).splitlines() == ["2 none, 13", "moments,", "1 mean"]
    assert fold("note: " + "word " * 10, 24, "  ").splitlines()[1] == "  word word word word"


def test_shortened() -> None:
    assert shorten("a long prompt about something", 12) == "a long…"
    assert shorten("x" * 40, 10) == "x" * 9 + "…"


def test_the_width_of_a_pipe_is_80(repo_root: Path) -> None:
    """And ``COLUMNS`` overrides it."""

    def lines(*arguments: str, **environment: str) -> list[str]:
        env = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"PYTHONPATH": str(repo_root), **environment}
        command = [sys.executable, "-m", "diffsparse.search", *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()

    plan = str(repo_root / "examples" / "tiny_wan" / "sparse_plan")
    assert 70 < max(map(len, lines("show", plan))) <= 80
    assert 80 < max(map(len, lines("show", plan, COLUMNS="144"))) <= 144


@pytest.mark.parametrize("width", [60, 80, 144])
def test_what_the_commands_print_fits(width: int, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from diffsparse.search.cli import app

    monkeypatch.setenv("COLUMNS", str(width))
    assert terminal_width() == width
    plan = str(repo_root / "examples" / "tiny_wan" / "sparse_plan")
    for command in (["show", plan], ["explain", plan], ["models"], ["env"]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert widest(done.stdout) <= width, (command, done.stdout)
