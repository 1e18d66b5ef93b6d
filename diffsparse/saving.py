"""Writing files so that a reader never meets half of one, and a plan's folder so that its files belong together."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffsparse.card import card_names_plan, is_own_card, seal_card

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DIGEST_KEY", "arrays_digest", "is_full", "write_plan", "write_whole"]

log = logging.getLogger("diffsparse")

JSON_NAME = "sparse_plan.json"
ARRAYS_NAME = "sparse_plan.safetensors"
CARD_NAME = "README.md"
# The key of a plan's JSON that binds its bitmaps to it.
DIGEST_KEY = "arrays_sha256"
# Others that save at the same time make one begin again; after so many times something else is wrong.
_TRIES = 60


def is_full(error: OSError) -> bool:
    """Whether there was no room: the disk is full, a quota is used up, or a file may not get that large."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Hexadecimal SHA-256 of named arrays: their names, types, shapes and values, in the order of the names."""
    import numpy as np  # the command line asks this module whether a disk is full, and is to start at once

    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(json.dumps([name, array.dtype.str, array.shape]).encode() + b"\n")
        total.update(array.tobytes())
    return total.hexdigest()


def _stage(path: Path, content: bytes) -> Path:
    """The content in a file beside ``path`` that no other process uses. An ``OSError`` names ``path``."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        # Python gives a failed write no name.
        raise type(error)(error.errno, error.strerror, str(path)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return partial


def write_whole(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write a file, whole or not at all: what was there before stays until all is written. Raises ``OSError``."""
    place = Path(path)
    partial = _stage(place, content)
    try:
        os.replace(partial, place)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return place


def write_plan(folder: Path, files: Mapping[str, bytes], card: str) -> None:
    """Put a plan's files and its card into a folder, replacing the plan that was there.

    Nothing is replaced before all is written, so a full disk leaves the old plan. The JSON comes first: until its
    bitmaps follow, the digest in it keeps the plan from being read. Where several processes save into one folder, one
    of their plans is there in the end, whole. A ``README.md`` that is not one of our cards is left alone.
    """
    contents = dict(files)
    if _may_replace(folder / CARD_NAME):
        contents[CARD_NAME] = seal_card(card, files[JSON_NAME]).encode()
    else:
        log.warning("%s was not written by diffsparse: it stays, and the plan gets no card", folder / CARD_NAME)
    _replace_all(folder, contents)
    for attempt in range(_TRIES):
        if _belongs_together(folder):
            return
        # Another process is saving. It may be about to end: look again before beginning anew.
        time.sleep(random.uniform(0, 0.002 * 2 ** min(attempt, 6)))
        if _belongs_together(folder):
            return
        _replace_all(folder, contents)
    raise OSError(errno.EBUSY, "other processes keep writing plans there; save it into another folder", str(folder))


def _may_replace(card: Path) -> bool:
    try:
        return is_own_card(card.read_text("utf-8"))
    except FileNotFoundError:
        return True
    except (UnicodeDecodeError, IsADirectoryError):
        return False


def _replace_all(folder: Path, contents: Mapping[str, bytes]) -> None:
    staged: dict[str, Path] = {}
    try:
        for name, content in contents.items():
            staged[name] = _stage(folder / name, content)
        for name in (JSON_NAME, ARRAYS_NAME, CARD_NAME):
            if name in staged:
                os.replace(staged.pop(name), folder / name)
            elif name == ARRAYS_NAME:
                (folder / name).unlink(missing_ok=True)
    finally:
        for partial in staged.values():
            partial.unlink(missing_ok=True)


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        return None


def _belongs_together(folder: Path) -> bool:
    """Whether JSON, bitmaps and card are of one plan. Another process's plan will do."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    content, packed, card = (_read(folder / name) for name in (JSON_NAME, ARRAYS_NAME, CARD_NAME))
    if content is None:
        return False
    try:
        wanted = json.loads(content).get(DIGEST_KEY)
        held = None if packed is None else arrays_digest(load(packed))
    except (ValueError, SafetensorError):
        return False
    return wanted == held and (card is None or card_names_plan(card.decode("utf-8", "replace"), content))
