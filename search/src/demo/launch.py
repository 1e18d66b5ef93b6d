"""Starting the demo: on this machine only, with nothing sent anywhere."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffsparse
from diffsparse.search.errors import BadInput

__all__ = ["HOST", "bundled_model", "serve", "serving"]

HOST = "127.0.0.1"
#: Read by Gradio when it is imported or launched.
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


def bundled_model() -> str:
    """The small model of the clone that this package runs from. Raises :class:`BadInput` where there is none."""
    folder = Path(diffsparse.__file__).resolve().parents[1] / "examples" / "tiny_wan"
    if not (folder / "model_index.json").is_file():
        raise BadInput(
            "the small model for the demo is only in a clone of the repository, and this is an installed package; name "
            "a model, a diffusers pipeline's folder or a Hub id: diffsparse demo --model "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    return str(folder)


def _check_gradio() -> None:
    if find_spec("gradio") is None:
        raise BadInput("the demo needs gradio; pip install 'diffsparse[demo]'")


def _check_port(port: int | None) -> None:
    if port is not None and not 1 <= port <= 65_535:
        raise BadInput(f"--port {port}: a port is a number from 1 to 65535, for example 7860")


@contextmanager
def _environment(root: Path) -> Iterator[None]:
    """Within, Gradio keeps what it keeps below ``root`` and reports nothing."""
    values = {**QUIET, "GRADIO_TEMP_DIR": str(root / "gradio")}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _uncollected() -> Iterator[None]:
    """Within, no garbage is looked for; what is there at the end stays out of every later look.

    Torch, diffusers and Gradio make more than a million objects while they are imported, all of them to stay. Going
    through them again and again took a quarter of the demo's start, and one look afterwards takes a second, which would
    fall into the first clip's time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_on:
            gc.enable()


@contextmanager
def serving(studio: Any, port: int | None = None) -> Iterator[str]:
    """Within, the page is served; gives its address. All that users uploaded and made is deleted at the end.

    ``port``: None is the first free one from 7860 on. Raises :class:`BadInput` where it is taken, or without Gradio.
    """
    _check_gradio()
    _check_port(port)
    root = Path(tempfile.mkdtemp(prefix="diffsparse-demo-"))
    try:
        with _environment(root):
            from diffsparse.search.demo.page import CSS, build_page, theme
            from diffsparse.search.demo.sessions import Sessions
            from diffsparse.search.demo.upload import MAX_ZIP_BYTES

            sessions = Sessions(root)
            page = build_page(studio, sessions)
            try:
                _, address, _ = page.launch(
                    server_name=HOST,
                    server_port=port,
                    prevent_thread_lock=True,
                    quiet=True,
                    share=False,
                    ssr_mode=False,
                    max_file_size=MAX_ZIP_BYTES,
                    footer_links=[],
                    theme=theme(),
                    css=CSS,
                )
            except OSError as error:
                raise BadInput(f"--port {port}: it is taken, or none is free; name another one ({error})") from None
            try:
                yield str(address)
            finally:
                sessions.close()
                page.close(verbose=False)
    finally:
        shutil.rmtree(root, ignore_errors=True)  # a generation that is stopping may still write a file


def serve(
    model: str | None = None,
    port: int | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    say: Callable[[str], None] = print,
    until: threading.Event | None = None,
) -> None:
    """Load a model (None: the clone's small one), serve the page, and wait: for Ctrl-C, or for ``until``."""
    _check_gradio()
    _check_port(port)
    name = bundled_model() if model is None else model
    say(f"loading {name}")  # before the imports, which take seconds
    with ExitStack() as running:
        with _uncollected():
            from diffsparse.search.demo.studio import Studio

            address = running.enter_context(serving(Studio.open(name, device, dtype), port))
        say(f"the demo is at {address} (Ctrl-C ends it)")
        (until or threading.Event()).wait()
