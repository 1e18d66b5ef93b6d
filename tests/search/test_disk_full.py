"""No room for what a command writes: one line, no litter, and what was there before stays."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.search import errors, load
from diffsparse.search.break_even import bench_break_even
from diffsparse.search.demo.generate import explain
from diffsparse.search.errors import BadInput, DiskFull, writing
from diffsparse.search.html import write_html
from diffsparse.search.report import write_picture, write_video
from diffsparse.search.search import search_plan
from diffsparse.search.show import draw
from tests.search.plans import make_plan
from tests.search.tiny import PROMPTS, SHAPE_OPTIONS, Cli, config

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is written whole gets half of its bytes out, and then finds the disk full."""
    opened = Path.open

    class Half(io.BytesIO):
        def __init__(self, path: Path) -> None:
            super().__init__()
            self.path = path

        def write(self, content: Any) -> int:
            with opened(self.path, "wb") as file:
                file.write(content[: len(content) // 2])
            raise FULL

    def patched(self: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
        return Half(self) if mode == "xb" else opened(self, mode, *args, **more)

    monkeypatch.setattr(Path, "open", patched)


def a_video(file: Path) -> Any:
    clip = torch.zeros(2, 3, 16, 16)
    return write_video(clip, clip, file)


def a_picture(file: Path) -> Any:
    from PIL import Image

    return write_picture(Image.new("RGB", (8, 8)), file)


GRID = TokenGrid(3, 12, 12)
WRITERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "the page": ("plan.html", lambda file: write_html(make_plan(), GRID, file)),
    "the drawing": ("plan.png", lambda file: draw(make_plan(), GRID, file)),
    "a sheet": ("sheet.png", a_picture),
}


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("what", WRITERS)
def test_what_is_written_whole(tmp_path: Path, what: str) -> None:
    name, write = WRITERS[what]
    (tmp_path / name).write_bytes(b"of before")
    with pytest.raises(DiskFull, match=f"the disk is full: no room to write {tmp_path / name}; free some space"):
        write(tmp_path / name)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(name, b"of before")]


def test_a_video_whose_encoder_says_it_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(frames: Any, path: str, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("FFMPEG COMMAND:\nffmpeg -y ...\nav_interleaved_write_frame(): No space left on device")

    monkeypatch.setattr("diffusers.utils.export_to_video", export)
    with pytest.raises(BadInput, match=r"cannot write .*clip\.mp4': FFMPEG COMMAND:; choose another --out"):
        a_video(tmp_path / "clip.mp4")
    monkeypatch.setattr(errors, "disk_is_full", lambda path: True)
    with pytest.raises(DiskFull, match="no room to write"):
        a_video(tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_all_ways_to_have_no_room(tmp_path: Path, code: int) -> None:
    with pytest.raises(DiskFull), writing(tmp_path):
        raise OSError(code, "as the system says it")
    with pytest.raises(BadInput, match="Permission denied; choose another --png"), writing(tmp_path, "--png"):
        raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.usefixtures("full")
def test_a_measured_table_is_shown_where_it_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("diffsparse.search.break_even.DENSITIES", (0.5, 1.0))
    for out in (str(tmp_path / "table.json"), ""):
        said: list[str] = []
        with pytest.raises(DiskFull, match="no room to write"):
            bench_break_even(
                torch.device("cpu"), heads=1, head_dim=16, dtype=torch.float32, block_size=64, tokens="128", out=out,
                say=said.append,
            )  # fmt: skip
        assert "share of kept blocks up to which sparse attention is faster" in said[-1]
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("*.partial"))


@pytest.mark.usefixtures("once_loaded", "full")
def test_an_evaluation_whose_files_find_no_room_tells_its_figures(
    cli: Cli,
    tmp_path: Path,
    model_folder: Path,
    prompts_file: Path,
) -> None:
    code, out, err = cli(
        "eval",
        model_folder,
        "window",
        "--prompts",
        prompts_file,
        "--seeds",
        1,
        *SHAPE_OPTIONS,
        "--out",
        tmp_path,
        "--json",
    )
    assert code == 2 and len(json.loads(out)["clips"]) == 2
    assert err.strip().splitlines()[-1].startswith("error: the disk is full: no room to write")
    assert not list(tmp_path.iterdir())


def test_a_plan_that_finds_no_room_is_not_searched_again(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    def search(say: Callable[[str], None]) -> Any:
        return search_plan(pipe, PROMPTS, config(validation_prompts=0), tmp_path, progress=False, say=say)

    request.getfixturevalue("full")
    with pytest.raises(DiskFull, match="run the same command again: it goes on from what was measured"):
        search(lambda line: None)
    assert [file.name for file in tmp_path.iterdir()] == ["search.sqlite"]
    monkeypatch.undo()
    for module in ("stages.probe", "stages.trace", "workspace"):
        monkeypatch.setattr(f"diffsparse.search.{module}.record", None)  # nothing is generated any more
    lines: list[str] = []
    search(lines.append)
    assert "going on" in lines[0] and (tmp_path / "sparse_plan.json").is_file()


def test_any_other_command_that_finds_no_room(
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*args: Any) -> None:
        raise FULL

    monkeypatch.setattr("diffsparse.search.tables.models_data", full)
    code, _, err = cli("models")
    assert (code, err) == (
        2,
        "error: the disk is full: no room to write; free some space, then run the command again\n",
    )
    assert explain(FULL) == "the disk of the machine that runs this demo is full; free some space, then try again"
    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(DiskFull):
        load.check_output(tmp_path)
