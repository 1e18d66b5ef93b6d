"""``diffsparse env``"""

from __future__ import annotations

from diffsparse.search.commands.common import Json, answers

__all__ = ["env_command"]


def env_command(as_json: Json = False) -> None:
    """Versions, devices and attention backends, to paste into an issue.

    \b
    Example:
      diffsparse env
    """
    with answers(as_json) as answer:
        from diffsparse.search.environment import full_environment
        from diffsparse.search.tables import environment_table

        found = full_environment()
        answer(found, environment_table(found))
