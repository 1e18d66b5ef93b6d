"""Wrong input to the scripts in ``benchmarks``: one line, before anything is measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from diffsparse.search import script
from tests.helpers.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
WAN = str(ROOT / "examples" / "tiny_wan")
PROMPTS = str(ROOT / "examples" / "tiny_wan" / "prompts" / "heldout.txt")
DENSITIES = "argument --densities: a list of densities above 0 and at most at 1, got "


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("kernels --cases uniform-32k,nope", "--cases: no 'nope'; there are uniform-32k, "),
        ("kernels --backends gluon", "--backends: no 'gluon'; there are gluon_sm90, triton, cpu, reference"),
        ("kernels --numerics auto,int4", "--numerics: no 'int4'; there are auto, int8, fp8"),
        ("kernels --dense cudnn", "--dense: no 'cudnn'; there are "),
        ("kernels --peers sage", "--peers: no 'sage'; there are flash_attention_4, "),
        ("kernels --tokens 300 --densities 0.5,2", DENSITIES + "'0.5,2'"),
        ("kernels --tokens 300 --densities ,", DENSITIES + "','"),
        ("kernels --tokens 300 --densities half", "--densities: invalid densities value: 'half'"),
        ("kernels --dtype half", "--dtype: invalid choice: 'half'"),
        ("kernels --tokens -5", "--tokens: must be at least 1, got -5"),
        ("kernels --tokens 300 --heads 0", "--heads: must be at least 1, got 0"),
        ("kernels --rounds few", "--rounds: invalid integer value: 'few'"),
        ("kernels --seconds -1", "--seconds: must be above 0, got -1"),
        ("kernels --seconds nan", "--seconds: must be above 0, got nan"),
        ("kernels --device gpu", "--device: unknown device 'gpu'; use auto, cpu, cuda, cuda:1, ..."),
        ("kernels --csv CLOSED/rows.csv", "--csv: cannot write to 'CLOSED/rows.csv': "),
        ("pipeline --models wan-15b", "unknown wan-15b; there are wan-1.3b-480p, "),
        ("pipeline --settings 2", "--settings '2': a density lies above 0 and at most at 1"),
        ("pipeline --backend gluon", "--backend: invalid choice: 'gluon'"),
        ("pipeline --tiny --most 0", "--most: must be at least 1, got 0"),
        ("pipeline --device gpu", "--device: unknown device 'gpu'"),
        ("pipeline --plot CLOSED/plot.png", "--plot: cannot write to 'CLOSED/plot.png': "),
        ("numerics --count 0", "--count: must be at least 1, got 0"),
        ("loop nope nope --prompts nope", "no plan at 'nope': it is a folder that `diffsparse search` wrote"),
        (f"loop nope dense --prompts {PROMPTS}", "no model at 'nope': no such folder"),
        ("loop nope dense --prompts nope --device gpu", "--device: unknown device 'gpu'"),
        ("quality nope nope --prompts nope", "no model at 'nope': no such folder"),
        (f"quality {WAN} nope --prompts {PROMPTS}", "no plan at 'nope': it is a folder that `diffsparse search` wrote"),
        ("quality nope nope --prompts nope --seeds 0", "--seeds: must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(
    line: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = line.split()
    monkeypatch.chdir(tmp_path)
    Path("CLOSED").write_text("a file where a folder is asked for")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    module = load_script(ROOT / "benchmarks" / f"{name}.py")
    with pytest.raises(SystemExit) as end:
        script.exit_with(module.main)
    assert end.value.code == 2
    printed = capsys.readouterr()
    last = printed.err.rstrip("\n").split("\n")[-1]
    assert reason in last and "error: " in last
    assert not printed.out, "something was measured"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["kernels", "pipeline"])
def test_a_gpu_that_is_not_there(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load_script(ROOT / "benchmarks" / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--device", "cuda"])
    with pytest.raises(SystemExit) as end:
        script.exit_with(module.main)
    assert end.value.code == 2 and "torch sees no CUDA GPU here; use --device cpu" in capsys.readouterr().err


def test_files_that_can_be_written_are_left_as_they_are(tmp_path: Path) -> None:
    assert script.out_file(str(tmp_path / "new" / "rows.csv")) == tmp_path / "new" / "rows.csv"
    assert not list((tmp_path / "new").iterdir())
    for kept in ("", "rows of an earlier run"):
        (tmp_path / "old.csv").write_text(kept)
        script.out_file(str(tmp_path / "old.csv"))
        assert (tmp_path / "old.csv").read_text() == kept


@pytest.mark.parametrize("status", [None, 0, 1])
def test_the_status_of_a_script(status: int | None) -> None:
    with pytest.raises(SystemExit) as end:
        script.exit_with(lambda: status)
    assert end.value.code == status


def test_what_is_no_mistake_of_the_user_keeps_its_traceback() -> None:
    def main() -> None:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        script.exit_with(main)
