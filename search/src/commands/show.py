"""``diffsparse show``"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from diffsparse.search.commands.common import Json, Plan, answers, interruptible
from diffsparse.search.errors import BadInput

__all__ = ["show_command"]


@interruptible("nothing was written")
def show_command(
    plan: Plan,
    grid: Annotated[
        str | None, typer.Option("--grid", metavar="T,H,W", help="Latent tokens to show the plan on.")
    ] = None,
    png: Annotated[str | None, typer.Option("--png", metavar="FILE", help="Draw every layer and head.")] = None,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="Write one page to look at every head in a browser.")
    ] = None,
    phase: Annotated[
        int | None, typer.Option("--phase", help="Draw this phase only, or open the page at it; counted from 0.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a plan does, layer by layer, and draw it.

    \b
    Example:
      diffsparse show plan --grid 21,30,52 --png plan.png --html plan.html
    """
    terminal = sys.stdout.isatty() and not as_json
    with answers(as_json) as answer:
        from diffsparse.search import load
        from diffsparse.search.measured import figures_beside
        from diffsparse.search.show import describe, draw, grid_of, parse_grid, plan_table

        given = parse_grid(grid) if grid else None
        chosen = load.load_plan(plan, grid=given)
        folder = None if plan in load.PRESETS else plan
        on = given or grid_of(chosen, folder)
        if phase is not None and not 0 <= phase < chosen.schedule.num_phases:
            raise BadInput(f"--phase {phase}: the plan has phases 0 to {chosen.schedule.num_phases - 1}")
        figures = figures_beside(chosen, folder, on)
        data, text = describe(chosen, on, figures), plan_table(chosen, on, figures, styled=terminal)
        if png is not None:
            data["png"] = str(draw(chosen, on, png, folder=folder, phase=phase))
            text += f"\n\nwritten: {png}"
        if html is not None:
            from diffsparse.search.html import write_html

            data["html"] = str(write_html(chosen, on, html, folder=folder, phase=phase))
            text += f"\n\nwritten: {html}"
        answer(data, text)
