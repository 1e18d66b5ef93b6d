"""What a comparison has made so far, in one folder, so that it goes on where it was stopped.

``compare.sqlite`` has the figures. Dense clips are files of their own, which shards share. A shard, one of several
processes on one comparison, keeps its figures in a file beside it; whoever opens the folder next takes them in.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffsparse.saving import write_whole
from diffsparse.search.errors import BadInput, writing
from diffsparse.search.generate import Clip
from diffsparse.search.inputs import Input
from diffsparse.search.store import SearchStore
from diffsparse.search.workspace import MAX_CLIP_BYTES

__all__ = ["RECORD_NAME", "ComparisonStore", "Record", "Shard"]

RECORD_NAME = "compare.sqlite"
AGAIN = "run the same command again to go on from there"


class ComparisonStore(SearchStore):
    """The record of a comparison."""

    noun, anew = "comparison", "compare anew"


@dataclass(frozen=True)
class Shard:
    """One of ``count`` processes that share a comparison: it makes every ``count``-th group of rows, from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``2/4``. Raises :class:`BadInput`."""
        parts = text.split("/")
        if len(parts) == 2 and all(part.isascii() and part.isdigit() and len(part) < 5 for part in parts):
            number, count = map(int, parts)
            if 1 <= number <= count:
                return cls(number, count)
        raise BadInput(f"--shard {text[:40]}: it is the number of a process and how many there are, as 1/4 to 4/4")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def mine(self, place: int) -> bool:
        """Whether something at a place of a list is this process's."""
        return place % self.count == self.number - 1

    def rotated(self, count: int) -> list[int]:
        """All places of a list, from where this process begins: the processes make what they share in parallel."""
        first = (self.number - 1) * count // self.count
        return [(first + i) % count for i in range(count)]


class Record:
    """The folder's figures and dense clips. A context manager.

    cases: input and seed of every clip. Raises :class:`~diffsparse.search.store.StoreMismatch` where the folder holds a
    comparison with other settings, and :class:`~diffsparse.search.store.StoreLocked` where another process has it.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], cases: list[tuple[Input, int]], shard: Shard | None
    ) -> None:
        self.folder, self.cases = folder, cases
        name = RECORD_NAME if shard is None else f"compare.{shard.number}-of-{shard.count}.sqlite"
        self.digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self._clips: dict[int, Clip] = {}
        self.store = ComparisonStore(folder / name)
        try:
            self.store.claim(identity)
            others = [folder / RECORD_NAME] if shard else sorted(folder.glob("compare.*-of-*.sqlite"))
            for path in others:
                if path.is_file():
                    self._take(path, identity)
        except BaseException:
            self.close()
            raise

    def _take(self, path: Path, identity: dict[str, Any]) -> None:
        with ComparisonStore(path, reading=True) as other:
            if "identity" not in other:
                return
            other.claim(identity)
            known = set(self.store.names())
            self.store.put_rows([row for row in other.rows("json") if row[0] not in known])

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self.store.__exit__()

    # -- figures ---------------------------------------------------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        return name in self.store

    def put(self, name: str, value: Any) -> None:
        """Keep a JSON value."""
        self.store.put_json(name, value)

    def get(self, name: str, default: Any = None) -> Any:
        """A JSON value, or ``default`` where there is none yet."""
        return self.store.get_json(name) if name in self.store else default

    def remove(self, name: str) -> None:
        """Forget all values whose names begin so."""
        self.store.remove(name)

    def clip(self, key: str, case: int) -> dict[str, Any] | None:
        """The figures of a row's clip; None where it is still to be made."""
        found = self.get(f"clip/{key}/{case}")
        assert found is None or isinstance(found, dict)
        return found

    def put_clip(self, key: str, case: int, figures: dict[str, Any]) -> None:
        """Keep them."""
        self.put(f"clip/{key}/{case}", figures)

    def missing(self, key: str) -> list[int]:
        """The cases of which a row has no clip yet."""
        done = set(self.store.names(f"clip/{key}/"))
        return [case for case in range(len(self.cases)) if f"clip/{key}/{case}" not in done]

    # -- dense clips -----------------------------------------------------------------------------------------------

    def _file(self, case: int) -> Path:
        return self.folder / "dense" / f"{case:04d}.safetensors"

    def has_dense(self, case: int) -> bool:
        """Whether a dense clip of this comparison is there."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file(case), "pt") as file:
                return bool((file.metadata() or {}).get("comparison") == self.digest)
        except (OSError, SafetensorError):
            return False

    def put_dense(self, case: int, clip: Clip, attention_seconds: float | None, alone: bool) -> None:
        """Keep a dense clip, its frames as they are, in 32 bits. Raises :class:`BadInput`."""
        from safetensors.torch import save

        figures = {
            "levels": clip.noise_levels,
            "loop_seconds": clip.loop_seconds,
            "seconds": clip.seconds,
            "attention_seconds": attention_seconds,
            "alone": alone,
        }
        about = {"comparison": self.digest, "figures": json.dumps(figures)}
        with writing(self._file(case), then=AGAIN):
            self._file(case).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file(case), save({"frames": clip.frames.contiguous()}, about))

    def dense_figures(self, case: int) -> dict[str, Any]:
        """``levels``, ``loop_seconds``, ``seconds``, ``attention_seconds`` and ``alone`` of a dense clip."""
        from safetensors import safe_open

        with safe_open(self._file(case), "pt") as file:
            found = json.loads(file.metadata()["figures"])
        assert isinstance(found, dict)
        return found

    def dense_clip(self, case: int) -> Clip:
        """A dense clip from its file; kept in memory as long as there is room."""
        from safetensors.torch import load_file

        if case not in self._clips:
            source, seed = self.cases[case]
            about = self.dense_figures(case)
            frames: torch.Tensor = load_file(self._file(case))["frames"]
            clip = Clip(
                source.name, seed, frames, tuple(about["levels"]), about["loop_seconds"], about["seconds"], source
            )
            if frames.nbytes + sum(known.frames.nbytes for known in self._clips.values()) > MAX_CLIP_BYTES:
                return clip
            self._clips[case] = clip
        return self._clips[case]
