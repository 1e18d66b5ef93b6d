"""The demo in a browser: generate dense and sparse side by side, and look into the plan.

    python examples/gradio_demo.py                       # the small model in this folder
    python examples/gradio_demo.py --model MODEL --port 7860

It needs the extra `demo` (pip install '.[demo]'). The same as `diffsparse demo`.
"""

from __future__ import annotations

import sys

from diffsparse.search.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
