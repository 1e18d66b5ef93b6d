"""``diffsparse models``"""

from __future__ import annotations

from typing import Annotated

import typer

from diffsparse.search.commands.common import Json, answers
from diffsparse.search.errors import BadInput

__all__ = ["models_command"]


def models_command(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The page docs/models.md.")] = False,
    as_json: Json = False,
) -> None:
    """The models that a plan can be attached to, and what of them stays dense.

    \b
    Example:
      diffsparse models
    """
    if as_markdown and as_json:
        raise BadInput("--markdown and --json are two different answers; give one of them")
    with answers(as_json) as answer:
        from diffsparse.search.tables import models_data, models_table

        if as_markdown:
            from diffsparse.pipelines.matrix import markdown

            answer({}, markdown().rstrip("\n"))
        else:
            answer(models_data(), models_table())
