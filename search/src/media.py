"""Pictures and clips that a pipeline is given: checked when they are named, read when the pipeline is called."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from diffsparse.search.columns import printable, shorten
from diffsparse.search.errors import BadInput
from diffsparse.search.signature import takes_files

__all__ = ["Media", "is_address", "media_of"]

#: Endings of files that hold a clip.
CLIPS = (".mp4", ".gif", ".webm", ".mov", ".avi", ".mkv")


def is_address(text: str) -> bool:
    return text.startswith(("http://", "https://"))


@dataclass(frozen=True)
class Media:
    """A file, or an address on the web, that holds a picture or a clip.

    ``source``: where it is. ``written``: the same as the user wrote it, for messages.
    """

    source: str
    written: str
    is_clip: bool

    @cached_property
    def digest(self) -> str:
        """Of the file's content; of an address itself, which is fetched when the pipeline is called."""
        if is_address(self.source):
            return hashlib.sha256(self.source.encode()).hexdigest()
        with open(self.source, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def load(self) -> Any:
        """A PIL image, or a list of them, in RGB. Raises :class:`BadInput` where it cannot be read."""
        from diffusers.utils import load_image, load_video

        try:
            if self.is_clip:
                return load_video(self.source, convert_method=lambda frames: [f.convert("RGB") for f in frames])
            return load_image(self.source)
        except (OSError, ValueError, ImportError, AttributeError) as error:
            raise BadInput(f"{self.written!r} cannot be read: {printable(shorten(str(error), 200))}") from error

    def check(self) -> None:
        """Raises :class:`BadInput` where the file is not there, or holds no picture or clip."""
        if is_address(self.source):
            return
        path, what = Path(self.source), "clip" if self.is_clip else "picture"
        if not path.is_file():
            raise BadInput(f"no file at {self.written!r}; a path is relative to the file that names it")
        if self.is_clip and path.suffix.lower() != ".gif":
            _check_clip(path, self.written)
            return
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                image.verify()
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            why = "" if isinstance(error, UnidentifiedImageError) else f" ({shorten(str(error), 100)})"
            raise BadInput(
                f"{self.written!r} is no {what} that can be read{why}; give a PNG, JPEG or the like"
            ) from None


def _check_clip(path: Path, written: str) -> None:
    try:
        import imageio
    except ImportError:
        raise BadInput(
            f"{written!r}: to read it, the package imageio is needed: pip install imageio imageio-ffmpeg; or give a "
            "GIF, or a list of pictures"
        ) from None
    try:
        with imageio.get_reader(path) as reader:
            reader.get_data(0)
    except ImportError:
        raise BadInput(
            f"{written!r}: to read it, the package imageio-ffmpeg is needed: pip install imageio-ffmpeg; or give a "
            "GIF, or a list of pictures"
        ) from None
    except (OSError, ValueError, IndexError, RuntimeError) as error:
        raise BadInput(
            f"{written!r} is no clip that can be read ({printable(shorten(str(error), 100))}); give an MP4, a GIF or a "
            "list of pictures"
        ) from None


def media_of(argument: str, value: Any, root: Path, in_list: bool = False) -> Any:
    """The value of an argument that takes files, with :class:`Media` in the place of every path.

    ``root``: the folder that paths are relative to. What is no text stays as it is: numbers, and pictures in memory.
    A list of pictures stands for a clip. An object's members count by their own names.
    Raises :class:`BadInput` where a file is not there or holds something else.
    """
    if isinstance(value, (str, Path)):
        return _file(argument, str(value), root, in_list)
    if isinstance(value, dict):
        return {name: media_of(name, item, root) if _takes_files(name) else item for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [media_of(argument, item, root, True) for item in value]
    return value


def _takes_files(member: str) -> bool:
    return member == "frames" or takes_files(member)


def _file(argument: str, text: str, root: Path, in_list: bool) -> Media:
    words = argument.split("_")
    address = is_address(text)
    source = text if address else str(root / Path(text).expanduser())
    is_clip = Path(urlsplit(text).path if address else text).suffix.lower() in CLIPS
    if not any(word in ("mask", "control", "controls", "frames") for word in words) or "video" in words:
        wants_clip = not in_list and any(word in ("video", "videos") for word in words)
        if wants_clip and not is_clip:
            raise BadInput(
                f"{argument} takes a clip, and {text!r} does not end as one ({', '.join(CLIPS)}); give a clip, or a "
                "list of pictures"
            )
        if is_clip and not wants_clip:
            raise BadInput(f"{argument} takes {'pictures' if in_list else 'a picture'}, and {text!r} is a clip")
    found = Media(source, text, is_clip)
    found.check()
    return found
