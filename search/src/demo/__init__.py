"""The demo in a browser: generate dense and sparse side by side, look into a plan, bring one's own.

Everything but :mod:`~diffsparse.search.demo.page` and :mod:`~diffsparse.search.demo.launch` works without Gradio.
"""
