"""A search of the tiny pipeline that processes share, as a script: each of them runs it, and their launcher says who is
who. Its argument is a JSON object."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffsparse.search.commands.common import stop
from diffsparse.search.errors import BadInput
from diffsparse.search.inputs import as_input, as_inputs
from diffsparse.search.ranks import launched, sharing
from diffsparse.search.search import search_plan
from diffsparse.search.store import SearchStore
from tests.search.conditioned import PIPELINES, write_files
from tests.search.tiny import PROMPTS, build_pipeline, config, fix_costs

#: Prompts of a search of which as many are traced as there are, but for the last one.
ALL_PROMPTS = [*PROMPTS, "a red square", "a blue circle", "a circle"]


def kill_after(writes: int) -> None:
    """Kill this process at its next write after so many."""
    original = SearchStore._write

    def dying(self: SearchStore, rows: list[tuple[str, str, bytes]]) -> None:
        nonlocal writes
        if (writes := writes - 1) < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, rows)

    SearchStore._write = dying  # type: ignore[method-assign]


def note_writes() -> list[str]:
    """Names of what this process writes, but for what a file is taken over from, which fills."""
    written: list[str] = []
    original = SearchStore.put_all

    def noting(self: SearchStore, named: dict[str, dict[str, np.ndarray]]) -> None:
        written.extend(named)
        original(self, named)

    SearchStore.put_all = noting  # type: ignore[method-assign]
    return written


def run(
    out: Path,
    prompts: int,
    kill: dict[str, int] | None = None,
    note: bool = False,
    pipeline: str | None = None,
    **changes: Any,
) -> None:
    """``kill``: by rank, after how many writes it is killed. ``note``: write what is measured into a file.

    ``pipeline``: one of those that are given pictures and clips.
    """
    torch.set_num_threads(1)
    place = launched()
    rank = 0 if place is None else place.rank
    if str(rank) in (kill or {}):
        kill_after((kill or {})[str(rank)])
    written = note_writes() if note else []
    with pytest.MonkeyPatch.context() as patch, sharing(place) as ranks:
        fix_costs(patch)
        wanted = config(**{"trace_prompts": prompts} | changes)
        lines: list[str] = []
        pipe, inputs = build_pipeline(), as_inputs(ALL_PROMPTS[: prompts + 1])
        if pipeline is not None:
            files = out.parent / f"files{rank}"
            files.mkdir(parents=True, exist_ok=True)
            write_files(files)
            pipe = PIPELINES[pipeline].build()
            inputs = [as_input(one, files) for one in PIPELINES[pipeline].inputs()]
        search_plan(pipe, inputs, wanted, out, progress=False, say=lines.append, ranks=ranks)
        (out / f"done{rank}.json").write_text(json.dumps(lines))
        (out / f"written{rank}.json").write_text(json.dumps(written))


if __name__ == "__main__":
    try:
        asked = json.loads(sys.argv[1])
        run(Path(asked.pop("out")), **asked)
    except BadInput as error:
        stop(f"error: {error}", 2)
