"""A plan from somebody else's zip: only the files of a plan, only inside one folder, only as large as plans are."""

from __future__ import annotations

import json
import stat
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from diffsparse.codec import PlanError
from diffsparse.plan import ARRAYS_NAME, CARD_NAME, JSON_NAME, SparsityPlan
from diffsparse.search.columns import shorten
from diffsparse.search.errors import BadInput
from diffsparse.search.measured import ATTENTION_NAME

__all__ = ["MAX_TOKENS", "MAX_ZIP_BYTES", "PLAN_FILES", "read_uploaded_plan", "unpack_plan", "write_plan_zip"]

#: What is taken out of a zip; everything else in it is left there.
PLAN_FILES = (JSON_NAME, ARRAYS_NAME, ATTENTION_NAME, CARD_NAME)
MAX_ZIP_BYTES = 128 * 2**20
MAX_FILES = 64
MAX_DIRECTORY_BYTES = 64 * 2**10
#: Unpacked bytes that any zip may have; a bitmap of mostly zeros really shrinks a lot, so small ones are let be.
FREE_BYTES = 16 * 2**20
MAX_RATIO = 100
MAX_TOTAL_BYTES = 256 * 2**20
MAX_JSON_BYTES = 8 * 2**20
#: Tokens of the largest grid that a plan may name: 129 frames of 720p are 118,800.
MAX_TOKENS = 200_000
CHUNK = 2**18

_END = b"PK\x05\x06"
_END_64 = b"PK\x06\x07"
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.3g} MiB"


def _check_directory(file: Path) -> None:
    """Size of the zip and of its list of files, before anything reads that list into memory."""
    size = file.stat().st_size
    if size > MAX_ZIP_BYTES:
        raise BadInput(f"the zip has {_mebibytes(size)}; a plan's has at most {_mebibytes(MAX_ZIP_BYTES)}")
    with file.open("rb") as stream:
        stream.seek(max(0, size - 2**16 - 64))
        tail = stream.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < 22:
        raise BadInput("this is not a zip file, or it is damaged; upload the zip of a plan's folder")
    if _END_64 in tail[max(0, at - 20) : at]:
        raise BadInput("the zip is in the format for more than 4 GiB, and no plan is that large; make a plain zip")
    count, directory = struct.unpack_from("<HI", tail, at + 10)
    if count > MAX_FILES or directory > MAX_DIRECTORY_BYTES:
        raise BadInput(f"the zip holds {count} files; a plan's holds at most {MAX_FILES}")


def _check_member(info: zipfile.ZipInfo) -> None:
    name = info.orig_filename
    shown = repr(shorten(name, 80))
    path = PurePosixPath(name.replace("\\", "/"))
    if "\0" in name or path.is_absolute() or ".." in path.parts or ":" in path.parts[0:1]:
        raise BadInput(f"the zip holds a path that leads outside of it ({shown}); nothing was unpacked")
    if len(name) > 1 and name[1] == ":":
        raise BadInput(f"the zip holds a path that leads outside of it ({shown}); nothing was unpacked")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise BadInput(f"the zip holds a link or a special file ({shown}); nothing was unpacked")
    if info.flag_bits & 0x1:
        raise BadInput(f"the zip is encrypted ({shown}); make one without a password")
    if info.compress_type not in _METHODS:
        raise BadInput(f"{shown} is compressed in another way than deflate; make a plain zip")


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The plan's files by name: at the top of the zip, or together in one folder of it."""
    for info in archive.infolist():
        _check_member(info)
    files = [info for info in archive.infolist() if not info.is_dir()]
    paths = {info: PurePosixPath(info.filename) for info in files}
    homes = {paths[info].parent for info in files if paths[info].name == JSON_NAME}
    if not homes:
        raise BadInput(f"the zip is not a plan: it has no {JSON_NAME}; zip the folder that `diffsparse search` wrote")
    if len(homes) > 1:
        raise BadInput(f"the zip holds {len(homes)} plans; upload one at a time")
    home = homes.pop()
    found: dict[str, zipfile.ZipInfo] = {}
    for info in files:
        name = paths[info].name
        if paths[info].parent != home or name not in PLAN_FILES:
            continue
        if name in found:
            raise BadInput(f"the zip holds {name} twice; which one is meant?")
        found[name] = info
    return found


def unpack_plan(file: Path, folder: Path) -> list[Path]:
    """Unpack a plan's files from a zip into an empty ``folder``; returns them. Raises :class:`BadInput`.

    Sizes are counted while unpacking, whatever the zip says about itself. Names in the zip never become paths: the
    files are written under the four names of :data:`PLAN_FILES`.
    """
    _check_directory(file)
    allowed = min(MAX_TOTAL_BYTES, max(FREE_BYTES, MAX_RATIO * file.stat().st_size))
    too_large = (
        f"the zip unpacks to more than {_mebibytes(allowed)}, out of {_mebibytes(file.stat().st_size)}: no plan does"
    )
    written = []
    try:
        with zipfile.ZipFile(file) as archive:
            members = _members(archive)
            if sum(info.file_size for info in members.values()) > allowed:
                raise BadInput(too_large)
            for name, info in members.items():
                target = folder / name
                with archive.open(info) as source, target.open("xb") as sink:
                    while chunk := source.read(CHUNK):
                        allowed -= len(chunk)
                        if allowed < 0:
                            raise BadInput(too_large)
                        sink.write(chunk)
                written.append(target)
    except BadInput:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, ValueError) as error:
        # What zipfile raises for damaged files is not only its own; an OSError's text may name a path of this machine.
        reason = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
        raise BadInput(f"the zip cannot be unpacked, it may be damaged ({shorten(reason, 120)})") from error
    return written


def _check_grids(data: Any) -> None:
    """Masks are made on the grids that a plan names, as soon as it is read: none may be larger than models are."""
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            grid = value.get("grid")
            if isinstance(grid, list):
                tokens = 1
                for n in grid:
                    if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= MAX_TOKENS:
                        raise BadInput(f"the plan names a grid {shorten(str(grid), 60)} that no model has")
                    tokens *= max(n, 1)
                if tokens > MAX_TOKENS:
                    raise BadInput(f"the plan names a grid of {tokens:,} tokens; at most {MAX_TOKENS:,} are shown here")
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def read_uploaded_plan(file: Path, folder: Path) -> SparsityPlan:
    """The plan in a zip, unpacked into an empty ``folder``. Raises :class:`BadInput` with what is wrong."""
    unpack_plan(file, folder)
    content = folder / JSON_NAME
    if content.stat().st_size > MAX_JSON_BYTES:
        size = _mebibytes(content.stat().st_size)
        raise BadInput(f"{JSON_NAME} has {size}; at most {_mebibytes(MAX_JSON_BYTES)} are taken here")
    try:
        _check_grids(json.loads(content.read_bytes()))
        return SparsityPlan.from_pretrained(folder)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadInput(f"{JSON_NAME} is not valid JSON ({shorten(str(error), 120)})") from error
    except PlanError as error:
        # The message names the file by its path here, which means nothing to the one who uploaded it.
        text = " ".join(str(error).replace(f"{folder}/", "").split())
        raise BadInput(f"the plan in the zip cannot be read: {shorten(text, 300)}") from error


def write_plan_zip(plan: SparsityPlan, file: Path, attention: Path | None = None) -> Path:
    """A plan's folder as a zip, with the search's pooled attention where there is one. Equal plans give equal bytes."""
    contents = plan.to_files()
    if attention is not None:
        contents[ATTENTION_NAME] = attention.read_bytes()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(contents):
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(info, contents[name])
    return file
