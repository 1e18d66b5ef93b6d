"""The command ``diffsparse``. Everything heavy is imported inside the commands, so that ``--help`` comes at once."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from diffsparse.search.commands.bench import bench_break_even_command, bench_kernels_command
from diffsparse.search.commands.common import BAD_INPUT, INTERRUPTED, say, stop
from diffsparse.search.commands.compare import compare_command
from diffsparse.search.commands.demo import demo_command
from diffsparse.search.commands.env import env_command
from diffsparse.search.commands.evaluate import eval_command
from diffsparse.search.commands.explain import explain_command
from diffsparse.search.commands.models import models_command
from diffsparse.search.commands.search import search_command
from diffsparse.search.commands.show import show_command
from diffsparse.search.errors import BadInput

__all__ = ["app", "main"]

app = typer.Typer(
    name="diffsparse",
    help="Sparse attention for diffusion transformers: search a plan, check it, look at it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench_app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        from diffsparse import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command("search")(search_command)
app.command("eval")(eval_command)
app.command("compare")(compare_command)
app.command("show")(show_command)
app.command("explain")(explain_command)
bench_app.command("kernels")(bench_kernels_command)
bench_app.command("break-even")(bench_break_even_command)
app.command("env")(env_command)
app.command("models")(models_command)
app.command("demo")(demo_command)

# Typer carries its own copy of click in some versions and uses the package in others; the base class is the same one.
_ClickException: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main(arguments: list[str] | None = None) -> NoReturn:
    """The console script. Exit codes: 0; 1: an evaluation failed; 2: input that cannot work; 130: Ctrl-C."""
    try:
        # Commands that start themselves in further processes need their own arguments.
        given = sys.argv[1:] if arguments is None else arguments
        code = app(arguments, prog_name="diffsparse", standalone_mode=False, obj=given)
    except BadInput as error:
        stop(f"error: {error}", BAD_INPUT)
    except OSError as error:
        from diffsparse.saving import is_full

        if not is_full(error):
            raise
        where = f" {error.filename}" if error.filename else ""
        stop(
            f"error: the disk is full: no room to write{where}; free some space, then run the command again", BAD_INPUT
        )
    except _ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "diffsparse"
        message = error.format_message()  # type: ignore[attr-defined]
        if type(error).__name__ == "NoArgsIsHelpError":  # the message is the help
            say(message)
            raise SystemExit(BAD_INPUT) from None
        stop(f"error: {message.rstrip('.')}; see `{command} --help`", BAD_INPUT)
    except typer.Abort:
        stop("interrupted", INTERRUPTED)
    raise SystemExit(code if isinstance(code, int) else 0)
