"""``python -m diffsparse`` is ``python -m diffsparse.search``, the command ``diffsparse``."""

import runpy

if __name__ == "__main__":
    # By its name, as the console script has it: this room imports none of the others.
    runpy.run_module("diffsparse.search", run_name="__main__", alter_sys=True)
