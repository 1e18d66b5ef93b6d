"""``--num-processes``: the same command in several processes of this machine, by torch's own launcher."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from diffsparse.search.errors import BadInput

__all__ = ["check_processes", "launch"]


def check_processes(count: int, device: str) -> None:
    """Raises :class:`BadInput` where this machine has fewer GPUs than processes that take one each."""
    import torch

    from diffsparse.search import load

    place = load.choose_device(device)
    if place.type != "cuda":
        return
    if place.index is not None and count > 1:
        raise BadInput(f"--device {device} and --num-processes {count}: each takes a GPU of its own; give cuda or auto")
    if count > (there := torch.cuda.device_count()):
        raise BadInput(
            f"--num-processes {count}: each takes a GPU of its own, and there are {there}; ask for {there} or fewer, "
            "or give --device cpu"
        )


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run ``python`` with these arguments in ``count`` processes; returns the exit code of the first that failed.

    They say for themselves what went wrong.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its reports of failures have many lines.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # All of them together take as many threads as one does.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        1, 1, count, run_id="diffsparse", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        code = int(error.get_first_failure()[1].exitcode)
        return code if code > 0 else 2
    except (KeyboardInterrupt, SignalException):
        return 130
    return 0
