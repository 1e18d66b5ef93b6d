"""Processes that share a search: who they are, what they tell each other, and what is said when one of them ends.

They are started by ``torchrun``, ``accelerate launch`` or ``--num-processes``, which say in the environment who is who.
What they tell each other lies in host memory, so they talk over gloo on every device; what is large goes through files.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsparse.search.columns import shorten
from diffsparse.search.errors import BadInput

if TYPE_CHECKING:
    import torch

__all__ = ["GO_ON", "Place", "RankLost", "Ranks", "join", "launched", "leading", "sharing"]

#: What says who is who, as torchrun and accelerate set it.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: For all to come together; then for the longest share of the work.
START, WAIT = timedelta(minutes=10), timedelta(days=7)
#: Seconds in which a process that closed its connection has ended.
ENDING = 3.0
GO_ON = "what all of them stored is kept; run the same command again to go on from there"


class RankLost(BadInput):
    """Another process of the search has ended, or this one was told to."""


@dataclass(frozen=True)
class Place:
    """This process among those of a launcher. ``local``: among those of its machine."""

    rank: int
    count: int
    local: int

    def device(self, name: str) -> torch.device:
        """Of this rank, where ``name`` is what ``--device`` says. Raises :class:`BadInput` where there is none."""
        import torch

        from diffsparse.search import load

        found = load.choose_device(name)
        if found.type != "cuda":
            return found
        if found.index is not None:
            raise BadInput(f"--device {name}: each of {self.count} processes takes a GPU of its own; give cuda or auto")
        if self.local >= (there := torch.cuda.device_count()):
            raise BadInput(
                f"process {self.local + 1} of this machine has no GPU: each takes one of its own, and there are "
                f"{there}; start {there} or fewer, or give --device cpu"
            )
        return torch.device("cuda", self.local)


def launched(environment: Mapping[str, str] | None = None) -> Place | None:
    """This process's place, by what its launcher says; None where it was started alone. Raises :class:`BadInput`."""
    environment = os.environ if environment is None else environment
    if "RANK" not in environment:
        return None
    if lacking := [name for name in VARIABLES if name not in environment]:
        raise BadInput(
            f"RANK is set and {', '.join(lacking)} not: start with torchrun, accelerate launch or --num-processes, "
            "or unset RANK"
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = environment.get(name, environment["RANK"])
        if not text.isdecimal():
            raise BadInput(f"{name} is {text!r}, and should be a number; start with torchrun or accelerate launch")
        numbers[name] = int(text)
    rank, count = numbers["RANK"], numbers["WORLD_SIZE"]
    if rank >= count:
        raise BadInput(f"RANK is {rank} and WORLD_SIZE {count}: ranks go from 0 to {count - 1}")
    return Place(rank, count, numbers["LOCAL_RANK"]) if count > 1 else None


class Ranks:
    """The processes of a search, from within one of them. All call the same methods in the same order.

    Rank 0 leads: it alone talks, writes the plan, and says what is done next. Every method raises :class:`RankLost`
    where another process has ended meanwhile. ``over``: nothing more is to be told.
    """

    def __init__(self, place: Place, group: Any) -> None:
        self.place, self.rank, self.count = place, place.rank, place.count
        self.over = False
        self._group = group
        self._members: list[tuple[str, int]] = [("", 0)] * place.count
        self._members = self.exchange((socket.gethostname(), os.getpid()))

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def exchange(self, value: Any) -> list[Any]:
        """What every rank gives, by rank."""
        import torch.distributed as dist

        found = [None] * self.count
        with self._talking():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def give(self, value: Any = None, source: int = 0) -> Any:
        """What the rank ``source`` gives, on all of them."""
        import torch.distributed as dist

        box = [value]
        with self._talking():
            dist.broadcast_object_list(box, src=source, group=self._group)
        return box[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within, every rank does its part. What one of them raises ends all, when each is through with its own.

        Rank 0's words come first; those of another are told with its number.
        """
        failure: Exception | None = None
        try:
            yield
        except RankLost:
            raise
        except Exception as error:
            failure = error
        except BaseException:
            self.over = True
            raise
        told = self.exchange(None if failure is None else _words(failure))
        failed = [rank for rank, words in enumerate(told) if words is not None]
        if not failed:
            return
        self.settle()
        if failure is not None and (self.leads or not isinstance(failure, BadInput)):
            raise failure
        words = told[failed[0]]
        raise BadInput(words if failed[0] == 0 else f"rank {failed[0]} of {self.count}: {words}")

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Raises :class:`BadInput` on all ranks where one has other settings than rank 0, with what differs."""
        for rank, other in enumerate(given := self.exchange(dict(settings))):
            differing = sorted(k for k in {*given[0], *other} if given[0].get(k) != other.get(k))
            if differing:
                self.settle()
                first = [shorten(str(each.get(differing[0])), 60) for each in (other, given[0])]
                raise BadInput(
                    f"rank {rank} has another {', '.join(differing)} than rank 0 ({first[0]}, not {first[1]}); "
                    "start all processes with the same arguments"
                )

    def dismiss(self, failure: str | None = None) -> None:
        """Rank 0 tells the others, who wait for what is next, that the search has ended."""
        if not self.over:
            self.settle()
            self.give(("end", failure))

    def settle(self) -> None:
        """All is said. The first process that ends makes its launcher stop the others, who are about to end, too."""
        self.over = True
        _heed(signal.SIG_IGN)

    def tells(self, error: BaseException) -> bool:
        """Whether this rank is the one that tells the user of an error."""
        if self.leads or not isinstance(error, RankLost):
            return self.leads
        gone = self.gone()
        return gone == [0] and self.rank == 1

    # -- when a process ends ---------------------------------------------------------------------------------------

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            # A connection that was closed: gloo raises plain errors.
            raise self.lost() from error

    def gone(self) -> list[int]:
        """Ranks of this machine whose process has ended."""
        host = socket.gethostname()
        return [r for r, (name, pid) in enumerate(self._members) if pid and name == host and _has_ended(pid)]

    def lost(self) -> RankLost:
        """What to raise when the others are out of reach."""
        self.settle()
        end = time.monotonic() + ENDING
        while not (gone := self.gone()) and time.monotonic() < end:
            time.sleep(0.05)
        if not gone:
            return RankLost(f"the search's {self.count} processes lost each other; {GO_ON}")
        who = f"rank {gone[0]} has" if len(gone) == 1 else f"ranks {', '.join(map(str, gone))} have"
        return RankLost(f"{who} ended, of {self.count} processes, and the search stops; {GO_ON}")

    def told_to_stop(self, *_: Any) -> None:
        """Handler of the signal by which launchers stop the others when a rank has ended."""
        self.settle()
        if self.gone():
            raise self.lost()
        raise RankLost(f"the search was stopped by a signal; {GO_ON}")


@contextmanager
def leading(ranks: Ranks | None) -> Iterator[None]:
    """Around what rank 0 does: when it ends, in whatever way, it tells the others, who wait for what is next."""
    try:
        yield
    except Exception as error:
        if ranks is not None:
            ranks.dismiss(_words(error))
        raise
    if ranks is not None:
        ranks.dismiss()


@contextmanager
def join(place: Place) -> Iterator[Ranks]:
    """Meet the other processes; within, they are :class:`Ranks`. A group that is there already stays."""
    import torch.distributed as dist

    own = not dist.is_initialized()
    if own:
        try:
            store, rank, count = next(iter(dist.rendezvous("env://", timeout=START)))
            dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=WAIT)
        except (RuntimeError, ValueError) as error:
            raise BadInput(
                f"rank {place.rank} of {place.count} cannot meet the others: {' '.join(str(error).split())[:200]}; "
                "start all processes with one torchrun or accelerate launch"
            ) from error
        group = None
    else:
        group = dist.new_group(backend="gloo", timeout=WAIT)
    before = None
    try:
        ranks = Ranks(place, group)
        before = _heed(ranks.told_to_stop)
        yield ranks
    finally:
        if before is not None:
            _heed(before)
        if own:
            dist.destroy_process_group()
        elif group is not None:
            dist.destroy_process_group(group)


@contextmanager
def sharing(place: Place | None) -> Iterator[Ranks | None]:
    """For a command: within, the processes that share it, None where there is one. Only one of them tells an error."""
    if place is None:
        yield None
        return
    with join(place) as ranks:
        try:
            yield ranks
        except BadInput as error:
            if ranks.tells(error):
                raise
        except KeyboardInterrupt:
            if ranks.leads:
                raise
            raise SystemExit(130) from None


def _heed(handler: Any) -> Any:
    """Set what SIGTERM does; returns what it did. None in a thread, where that cannot be set."""
    try:
        return signal.signal(signal.SIGTERM, handler)
    except ValueError:
        return None


def _words(error: Exception) -> str:
    return (
        str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    )


def _has_ended(pid: int) -> bool:
    """Whether a process of this machine is no more; one that its parent has not asked about yet is none."""
    status = Path(f"/proc/{pid}/stat")
    if status.parent.parent.joinpath("self").exists():
        try:
            # The state is behind the name, which is in brackets and may hold anything.
            return status.read_text("utf-8", "replace").rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
