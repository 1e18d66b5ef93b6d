"""What is running in this thread: the forward of an enabled model, and the attention layer inside it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffsparse.pipelines.call import Call
    from diffsparse.pipelines.state import LayerState

__all__ = ["CTX", "EPOCH"]


class Context(threading.local):
    """Set by the hooks of enabled models, None everywhere else. (A ContextVar cannot be traced by Dynamo.)"""

    layer: LayerState | None = None
    call: Call | None = None


class Epoch:
    """A string that compiled code guards on.

    Dynamo does not guard on hooks: a graph traced while a model was dense would go on being used after it was enabled.
    Every change of hooks changes the tag, and so has the graphs traced anew.
    """

    def __init__(self) -> None:
        self.tag = "0"

    def bump(self) -> None:
        self.tag = str(int(self.tag) + 1)


CTX = Context()
EPOCH = Epoch()
