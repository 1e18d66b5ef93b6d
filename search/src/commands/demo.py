"""``diffsparse demo``"""

from __future__ import annotations

from typing import Annotated

import typer

from diffsparse.search.commands.common import Device, Dtype, interruptible, say

__all__ = ["demo_command"]


@interruptible("the demo has ended")
def demo_command(
    model: Annotated[
        str | None,
        typer.Option("--model", help="A pipeline's folder or Hub id.  [default: the small model of the clone]"),
    ] = None,
    port: Annotated[int | None, typer.Option("--port", help="[default: the first free one from 7860 on]")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Generate dense and sparse side by side in a browser, and look into plans. On this machine only.

    \b
    Example:
      diffsparse demo --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    """
    from diffsparse.search.demo.launch import serve

    serve(model, port, device=device, dtype=dtype, say=say)
