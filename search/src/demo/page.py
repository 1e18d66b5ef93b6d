"""The page: components and what happens when they are used. All work is done by the modules beside this one."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from diffsparse.search.demo.generate import Request, Update, explain, generate
from diffsparse.search.demo.inspector import PlanView
from diffsparse.search.demo.search_plan import search_updates
from diffsparse.search.demo.sessions import Session, Sessions
from diffsparse.search.demo.studio import (
    CONSERVATIVE,
    DEFAULT_DENSITY,
    RADIAL,
    SEARCHED_HERE,
    SHIPPED,
    UPLOADED,
    WINDOW,
    Studio,
)
from diffsparse.search.errors import BadInput

__all__ = ["CSS", "build_page", "theme"]

CSS = """
.ds-status { padding: .6rem .8rem; border-radius: .4rem; border-left: 4px solid #6b7480; min-height: 3rem; }
.ds-status.busy { border-color: #2d62a8; } .ds-status.done { border-color: #2c7a4b; }
.ds-status.error { border-color: #b3261e; } .ds-status.stopped { border-color: #9a6700; }
.ds-status progress { width: 100%; height: .6rem; }
.ds-scroll { overflow-x: auto; }
.ds-heads table { border-collapse: separate; border-spacing: 3px; width: auto; }
.ds-heads table, .ds-heads tr, .ds-heads th, .ds-heads td { border: 0 !important; }
.ds-heads th { font-weight: normal; font-size: .8rem; padding: 0 .4rem; text-align: right; white-space: nowrap; }
.ds-heads thead th { text-align: center; }
.ds-heads td { padding: 0; }
.ds-heads button { width: 2.4rem; height: 2rem; padding: 0; border-radius: .25rem; font-size: .8rem; cursor: pointer;
  text-align: center; }
.ds-heads button[aria-pressed=true] { outline: 3px solid #d9480f; outline-offset: 1px; }
.ds-heads button:focus-visible { outline: 3px dashed #d9480f; outline-offset: 1px; }
.ds-legend span { margin-right: 1rem; white-space: nowrap; }
.ds-legend i { display: inline-block; width: .9rem; height: .9rem; border-radius: .2rem; margin-right: .3rem; }
.ds-figures { width: 100%; border-collapse: collapse; overflow-wrap: anywhere; }
.ds-figures, .ds-figures tr, .ds-figures th, .ds-figures td { border: 0 !important; }
.ds-figures tr + tr > * { border-top: 1px solid var(--border-color-primary) !important; }
.ds-figures th { text-align: left; font-weight: normal; padding: .3rem .6rem .3rem 0; width: 45%; }
.ds-figures td { padding: .3rem 0; font-variant-numeric: tabular-nums; }
.ds-blocks img { image-rendering: pixelated; }
input[role=combobox] { text-overflow: ellipsis; padding-right: 1.8rem !important; }
"""

#: The buttons of the grid of heads are plain HTML; a click on one, or Enter, names its layer and head.
PICK = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-head]');
  if (button) trigger('click', {layer: Number(button.dataset.layer), head: Number(button.dataset.head)});
});
"""

PLAN_LABELS = {
    SHIPPED: "searched (shipped with the model)",
    CONSERVATIVE: "conservative",
    WINDOW: "window",
    RADIAL: "radial",
    SEARCHED_HERE: "searched on this page",
    UPLOADED: "an uploaded plan",
}
#: Not the one that would share a picture on a hub.
BUTTONS = ["download", "fullscreen"]
#: Pixels that small pictures are enlarged to.
SHOWN = 288
IDLE = '<div class="ds-status" role="status" aria-live="polite">Nothing is running.</div>'


def theme() -> Any:
    """Plain, and with fonts of this machine: others would be fetched from elsewhere."""
    fonts = ("system-ui", "sans-serif")
    return gr.themes.Default(font=fonts, font_mono=("ui-monospace", "monospace"))


def _status(kind: str, message: str, fraction: float | None = None) -> str:
    bar = "" if fraction is None else f'<progress max="1" value="{fraction:.3f}" aria-label="progress"></progress>'
    role = "alert" if kind == "error" else "status"
    lead = "Cannot do that: " if kind == "error" else ""
    text = html.escape(lead + message)
    return f'<div class="ds-status {kind}" role="{role}" aria-live="polite"><p>{text}</p>{bar}</div>'


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = "".join(f'<tr><th scope="row">{html.escape(a)}</th><td>{html.escape(b)}</td></tr>' for a, b in rows)
    return f'<table class="ds-figures">{lines}</table>'


def _enlarged(picture: np.ndarray) -> Image.Image:
    """A small picture, larger by a whole factor."""
    image = Image.fromarray(picture)
    factor = max(1, SHOWN // image.height)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def _choices(studio: Studio) -> list[tuple[str, str]]:
    return [(PLAN_LABELS[name], name) for name in studio.plans]


class _Page:
    def __init__(self, studio: Studio, sessions: Sessions) -> None:
        self.studio, self.sessions = studio, sessions

    def session(self, request: gr.Request) -> Session:
        """Whose page this is."""
        if not request.session_hash:
            raise BadInput("this page has no session; load it again")
        return self.sessions.of(request.session_hash)

    def cancel(self, request: gr.Request, what: str) -> Any:
        """Stops what the session has under way, after the ``what`` at hand; gives the status line's new text."""
        session = self.session(request)
        job = session.job
        if not session.cancel() or job is None:
            return _status("stopped", "nothing is running")
        if not job.started:
            return _status("stopped", "cancelled")
        # Not in the status line: this answer may come after the last word of what it stops.
        gr.Info(f"Stopping after the {what} at hand.", duration=3)
        return gr.skip()

    # -- generate --------------------------------------------------------------------------------------------------

    def generate_tab(self) -> None:
        studio, known = self.studio, self.studio.defaults()
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                first = studio.examples[0] if studio.examples else ""
                prompt = gr.Textbox(first, label="Prompt", lines=2, elem_id="prompt")
                if studio.examples:
                    gr.Examples([[text] for text in studio.examples], [prompt], label="Examples")
                with gr.Row():
                    run = gr.Button("Generate", variant="primary", elem_id="generate")
                    cancel = gr.Button("Cancel", variant="stop", elem_id="cancel")
            with gr.Column(scale=2, min_width=300):
                plan = gr.Radio(_choices(studio), value=studio.plans[0], label="Plan", elem_id="plan")
                density = gr.Slider(
                    0.05, 1, DEFAULT_DENSITY, step=0.01, label="Density of a sparse call (about)", visible=False
                )
                upload = gr.File(label="A plan's folder as zip", file_types=[".zip"], visible=False, elem_id="upload")
                uploaded = gr.HTML()
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, min_width=90, elem_id="seed")
                    steps = gr.Number(
                        known.num_inference_steps, label="Steps", precision=0, min_width=90, elem_id="steps"
                    )
                with gr.Accordion("Size and guidance", open=False):
                    with gr.Row():
                        guidance = gr.Number(
                            known.guidance_scale, label="Guidance", min_width=90, visible=studio.takes("guidance_scale")
                        )
                        height = gr.Number(known.height, label="Height (pixels)", precision=0, min_width=90)
                        width = gr.Number(known.width, label="Width (pixels)", precision=0, min_width=90)
                        frames = gr.Number(
                            known.num_frames, label="Frames", precision=0, min_width=90, visible=studio.is_video
                        )
        status = gr.HTML(IDLE, elem_id="status")
        gr.Markdown(
            "The dense clip is made first, then the sparse one with the same seed: at once they would slow each other "
            "down, and the speed-up would be wrong. Until a clip is done its first frame is shown as it takes shape."
        )
        with gr.Row():
            dense = gr.Image(
                label="dense", interactive=False, buttons=BUTTONS, height=320, elem_id="dense", min_width=240
            )
            sparse = gr.Image(
                label="sparse", interactive=False, buttons=BUTTONS, height=320, elem_id="sparse", min_width=240
            )
        figures = gr.HTML(elem_id="figures")
        video = gr.Video(
            label="Side by side",
            show_label=False,
            visible=False,
            loop=True,
            autoplay=True,
            height=420,
            buttons=["download"],
            elem_id="video",
        )
        with gr.Column(visible=False) as details:
            frame = gr.Slider(1, 2, 1, step=1, label="Frame", elem_id="frame")
            one = gr.Image(label="Frame by frame", show_label=False, interactive=False, buttons=BUTTONS, elem_id="one")
            sheet = gr.Image(label="All frames", show_label=False, interactive=False, buttons=BUTTONS, elem_id="sheet")

        def shown(update: Update) -> dict[Any, Any]:
            fraction = update.fraction if update.kind == "busy" else None
            result: dict[Any, Any] = {status: _status(update.kind, update.message, fraction)}
            if update.dense is not None:
                result[dense] = _enlarged(update.dense)
            if update.sparse is not None:
                result[sparse] = _enlarged(update.sparse)
            if (found := update.comparison) is not None:
                result |= {
                    figures: _table(found.rows),
                    details: gr.update(visible=True),
                    # A slider from 1 to 1 is none.
                    frame: gr.update(maximum=max(found.num_frames, 2), value=1, visible=found.num_frames > 1),
                    one: found.frame(0),
                    sheet: found.sheet(),
                    video: gr.update(value=found.video and str(found.video), visible=found.video is not None),
                }
            return result

        def begin(request: gr.Request) -> Any:
            session = self.session(request)
            session.begin()
            return (
                _status("busy", "waiting for the model: others may be before you", 0.0),
                *(None, None, ""),
                gr.update(value=None, visible=False),
                gr.update(visible=False),
            )

        def go(request: gr.Request, *values: Any) -> Iterator[Any]:
            session = self.session(request)
            if session.job is None:
                yield {status: _status("stopped", "cancelled")}
                return
            session.job.started = True
            for update in generate(self.studio, session, session.job, Request(*values)):
                yield shown(update)

        def stop(request: gr.Request) -> Any:
            return self.cancel(request, "step")

        def choose(name: str) -> tuple[Any, Any]:
            return gr.update(visible=name in (WINDOW, RADIAL)), gr.update(visible=name == UPLOADED)

        def take(file: str | None, request: gr.Request) -> tuple[str, Any]:
            if file is None:
                return "", None
            try:
                view = self.studio.take_upload(Path(file), self.session(request))
            except Exception as error:
                return _status("error", explain(error)), None
            layers, heads = len(view.layers), view.heads
            about = f"the plan fits: {view.plan.schedule.num_phases} phases, {layers} layers, {heads} heads"
            return _status("done", about), gr.skip()

        def look(index: float, request: gr.Request) -> Any:
            found = self.session(request).comparison
            return gr.skip() if found is None else found.frame(int(index) - 1)

        asked = [prompt, seed, steps, plan, density, guidance, height, width, frames]
        cleared = [status, dense, sparse, figures, video, details]
        for trigger in (run.click, prompt.submit):
            trigger(begin, None, cleared, queue=False, show_progress="hidden", api_visibility="private").then(
                go,
                asked,
                [status, dense, sparse, figures, details, frame, one, sheet, video],
                concurrency_limit=1,
                concurrency_id="model",
                show_progress="hidden",
                api_visibility="private",
            )
        cancel.click(stop, None, status, queue=False, show_progress="hidden", api_visibility="private")
        plan.change(choose, plan, [density, upload], queue=False, show_progress="hidden", api_visibility="private")
        upload.upload(take, upload, [uploaded, upload], api_visibility="private")
        frame.input(look, frame, one, show_progress="hidden", api_visibility="private")

    # -- search ----------------------------------------------------------------------------------------------------

    def search_tab(self) -> None:
        known = self.studio.defaults()
        gr.Markdown(
            "Searches a plan for this model, measured on a few prompts and on this machine, with the sizes and "
            "guidance that the tab Generate starts with. A search that was cancelled goes on where it was while this "
            "page is open; for a long one, `diffsparse search` keeps its record in a folder of yours."
        )
        prompts = gr.Textbox(
            "\n".join(self.studio.calibration), label="Prompts, one a line", lines=6, elem_id="prompts"
        )
        with gr.Row():
            budget = gr.Slider(0.05, 1, 0.4, step=0.01, label="Budget (share of the dense attention time)")
            steps = gr.Number(known.num_inference_steps, label="Steps to search for", precision=0)
        with gr.Row():
            run = gr.Button("Search", variant="primary", elem_id="search")
            cancel = gr.Button("Cancel the search", variant="stop", elem_id="cancel_search")
        status = gr.HTML(IDLE, elem_id="search_status")
        stages = gr.HTML(elem_id="stages")

        def begin(request: gr.Request) -> tuple[str, str]:
            self.session(request).begin()
            return _status("busy", "waiting for the model: others may be before you", 0.0), ""

        def go(request: gr.Request, *values: Any) -> Iterator[Any]:
            session = self.session(request)
            if session.job is None:
                yield _status("stopped", "cancelled"), ""
                return
            session.job.started = True
            for update in search_updates(self.studio, session, session.job, *values):
                fraction = update.fraction if update.kind == "busy" else None
                items = "".join(f"<li>{html.escape(line)}</li>" for line in update.lines)
                yield _status(update.kind, update.message, fraction), f"<ol>{items}</ol>"

        def stop(request: gr.Request) -> Any:
            return self.cancel(request, "model call")

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        run.click(begin, None, [status, stages], queue=False, **quiet).then(
            go, [prompts, budget, steps], [status, stages], concurrency_limit=1, concurrency_id="model", **quiet
        )
        cancel.click(stop, None, status, queue=False, **quiet)

    # -- inspect ---------------------------------------------------------------------------------------------------

    def inspect_tab(self, page: gr.Blocks) -> None:
        studio = self.studio
        with gr.Row():
            plan = gr.Dropdown(_choices(studio), value=studio.plans[0], label="Plan", min_width=200)
            phase = gr.Dropdown([], label="Phase", min_width=160, elem_id="phase")
            layer = gr.Dropdown([], label="Layer", min_width=220, elem_id="layer")
            head = gr.Dropdown([], label="Head", min_width=100, elem_id="head")
            download = gr.DownloadButton("Download the plan", elem_id="download")
        step = gr.Slider(1, 20, 1, step=1, label="Step", elem_id="step")
        message = gr.HTML(elem_id="message")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                overview = gr.HTML(js_on_load=PICK, elem_id="heads")
            with gr.Column(scale=2, min_width=300):
                facts = gr.HTML(elem_id="facts")
        with gr.Row(elem_classes="ds-blocks"):
            measured = gr.Image(
                label="Measured attention", interactive=False, buttons=BUTTONS, min_width=240, elem_id="measured"
            )
            mask = gr.Image(label="What is computed", interactive=False, buttons=BUTTONS, min_width=240, elem_id="mask")
        pictures = [message, overview, facts, measured, mask]

        def draw(view: PlanView, p: int, i: int, j: int, text: str = "") -> dict[Any, Any]:
            attention, kept = view.pictures(p, i, j)
            return {
                message: text or _line(f"phase {view.phase_names[p]}"),
                overview: view.overview(p, i, j),
                facts: _table(view.facts(p, i, j)),
                measured: gr.update(value=attention, visible=attention is not None),
                mask: gr.update(value=kept, label="What is computed" + (", over it" if attention else "")),
            }

        def checked(fn: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
            @functools.wraps(fn)  # Gradio passes the request and the event by the types of the parameters
            def answer(*values: Any) -> dict[Any, Any]:
                try:
                    return fn(*values)
                except Exception as error:
                    return {message: _status("error", explain(error))}

            return answer

        def viewed(request: gr.Request) -> PlanView:
            session = self.session(request)
            if session.view is None:
                session.view = self.studio.view(studio.plans[0], session)
            return session.view

        def load(name: Any, request: gr.Request) -> dict[Any, Any]:
            session = self.session(request)
            view = session.view = self.studio.view(name, session)
            levels, own = self.studio.trajectory(view.steps)
            note = "" if own else " (evenly spread: the scheduler tells its own only with a picture's size)"
            return {
                phase: gr.update(choices=[(text, i) for i, text in enumerate(view.phase_names)], value=0),
                layer: gr.update(choices=[(text, i) for i, text in enumerate(view.layers)], value=0),
                head: gr.update(choices=[(str(i), i) for i in range(view.heads)], value=0),
                step: gr.update(maximum=max(view.steps, 2), value=1),
                download: gr.update(value=str(view.write_zip(session.new_folder()))),
                **draw(view, 0, 0, 0, _line(view.step(levels, 1)[1] + note)),
            }

        def show(p: Any, i: Any, j: Any, request: gr.Request) -> dict[Any, Any]:
            view = viewed(request)
            return draw(view, *view.check(p, i, j))

        def pick(p: Any, event: gr.EventData, request: gr.Request) -> dict[Any, Any]:
            view = viewed(request)
            p, i, j = view.check(p, getattr(event, "layer", None), getattr(event, "head", None))
            return {layer: i, head: j, **draw(view, p, i, j)}

        def scrub(number: Any, i: Any, j: Any, request: gr.Request) -> dict[Any, Any]:
            view = viewed(request)
            levels, _ = self.studio.trajectory(view.steps)
            found, text = view.step(levels, int(number))
            if found is None:
                return {message: _line(text + ": all heads compute everything at this step")}
            return {phase: found, **draw(view, *view.check(found, i, j), _line(text))}

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        everything = [phase, layer, head, step, download, *pictures]
        plan.input(checked(load), plan, everything, **quiet)
        page.load(checked(load), plan, everything, **quiet)
        for control in (phase, layer, head):
            control.input(checked(show), [phase, layer, head], pictures, **quiet)
        overview.click(checked(pick), phase, [layer, head, *pictures], **quiet)
        step.input(checked(scrub), [step, layer, head], [phase, *pictures], **quiet)


def _line(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def build_page(studio: Studio, sessions: Sessions) -> gr.Blocks:
    """The whole page, not served yet."""
    page = _Page(studio, sessions)

    def leave(request: gr.Request) -> None:
        if request.session_hash:
            sessions.end(request.session_hash)

    with gr.Blocks(title="diffsparse", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"# diffsparse\nSparse attention on **{html.escape(studio.name)}**, {studio.pipe.device.type}.")
        with gr.Tab("Generate"):
            page.generate_tab()
        with gr.Tab("Inspect"):
            page.inspect_tab(blocks)
        with gr.Tab("Search"):
            page.search_tab()
        blocks.unload(leave)
    blocks.queue(max_size=32, default_concurrency_limit=4)
    return blocks
