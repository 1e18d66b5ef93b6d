"""A comparison as one HTML file that opens from disk: tables, picture, and the clips side by side.

Everything is inside the file, and its policy allows no script and no connection.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from diffsparse import __version__
from diffsparse.search.columns import GLUE
from diffsparse.search.compare.calls import calls_table, calls_title
from diffsparse.search.compare.equal_time import equal_time
from diffsparse.search.compare.pictures import find_picture
from diffsparse.search.compare.table import best_lines, facts, rows_table, time_table

if TYPE_CHECKING:
    from diffsparse.search.compare.result import Comparison, RowResult

__all__ = ["comparison_page"]

STYLE = """
:root { color-scheme: light dark; --paper: #fafaf8; --card: #fff; --ink: #1c2026; --faint: #5c646e; --line: #d3d7dd; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16191d; --card: #1f2328; --ink: #e8eaed; --faint: #a3abb5; --line: #3b424b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1360px; padding: 18px 20px 40px; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 6px; } h2 { font-size: 1.1rem; margin: 26px 0 8px; }
h3 { font-size: .95rem; font-weight: 600; margin: 18px 0 6px; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 6px 16px 16px;
  margin-top: 16px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; text-align: right; border-top: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, td.text, th.text { text-align: left; } td.text { white-space: normal; }
thead th { border-top: 0; color: var(--faint); font-weight: normal; }
tr.searched td { font-weight: 600; }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 14px; margin: 8px 0; }
.facts dt { color: var(--faint); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.best { font-size: 1.05rem; margin: 2px 0; } .note { color: var(--faint); font-size: .88rem; margin: 6px 0; }
.plot { max-width: 100%; height: auto; display: block; border-radius: 6px; margin-top: 10px; }
.clips { display: flex; flex-wrap: wrap; gap: 12px; }
figure { margin: 0; width: 176px; } figure img { width: 100%; display: block; border-radius: 4px; }
figcaption { font-size: .82rem; line-height: 1.3; margin-top: 3px; } figcaption span { color: var(--faint); }
footer { color: var(--faint); font-size: .85rem; margin-top: 18px; }
"""


def comparison_page(comparison: Comparison, folder: Path, shown: Sequence[int], plot: Image.Image) -> str:
    """The whole page. ``folder``: where the small pictures of clips are. ``shown``: the cases that have them."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
    buffer = io.BytesIO()
    plot.save(buffer, "PNG")
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Methods compared</title>\n<style>{STYLE}</style>\n</head>\n<body>",
        "<h1>Methods compared on one model</h1>",
        *(f'<p class="best">{_text(line)}</p>' for line in best_lines(comparison)),
        '<dl class="facts">',
        *(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts(comparison)),
        "</dl>",
        f'<img class="plot" alt="PSNR of all rows against density and against time" src="{_data(buffer.getvalue())}">',
    ]
    for density in comparison.densities:
        parts += _table(comparison, f"At a density of {density:g}", comparison.at(density))
    if comparison.others:
        parts += _table(comparison, "Plans at other densities", comparison.others)
    for table in equal_time(comparison):
        header, cells = time_table(table)
        parts += [
            f"<section><h2>At equal time: {table.seconds:.3g} s a loop, as {_text(table.reference)}</h2>",
            '<p class="note">Between two points of a method, its clips are interpolated one by one.</p>',
            _html_table(header, cells, text=(3, 4)),
            "</section>",
        ]
    if comparison.calls is not None:
        parts += [
            "<section><h2>Single calls</h2>",
            f'<p class="note">{_text(calls_title(comparison.calls))}</p>',
            _html_table(*calls_table(comparison.calls)),
            "</section>",
        ]
    for case in shown:
        parts += _clips(comparison, folder, case)
    parts.append(f"<footer>diffsparse {__version__}; all figures are in compare.json beside this page.</footer>")
    return "\n".join([*parts, "</body>\n</html>\n"])


def _text(text: str) -> str:
    return html.escape(text.replace(GLUE, " "))


def _data(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _html_table(
    header: Sequence[str], cells: Sequence[Sequence[str]], text: Sequence[int] = (), bold: Sequence[bool] = ()
) -> str:
    """``text``: columns that are aligned to the left and may wrap. ``bold``: rows that stand out."""

    def line(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=text' if i in text else ''}>{_text(cell)}</{tag}>" for i, cell in enumerate(row)
        )

    body = "".join(
        f"<tr{' class=searched' if i < len(bold) and bold[i] else ''}>{line('td', row)}</tr>\n"
        for i, row in enumerate(cells)
    )
    head = f"<thead><tr>{line('th', header)}</tr></thead>"
    return f'<div class="scroll"><table>{head}\n<tbody>\n{body}</tbody></table></div>'


def _table(comparison: Comparison, title: str, rows: Sequence[RowResult]) -> list[str]:
    header, cells = rows_table(comparison, rows)
    bold = [row.searched for row in rows if row.clips]
    parts = [f"<section><h2>{_text(title)}</h2>"]
    if cells:
        parts.append(_html_table(header, cells, (len(header) - 1,), bold))
    parts += [
        f'<p class="note">{_text(row.name)}: {_text(row.reason or row.state)}</p>' for row in rows if not row.clips
    ]
    parts += [f'<p class="note">{_text(row.name)}: {_text(row.note)}</p>' for row in rows if row.note]
    return [*parts, "</section>"]


def _clips(comparison: Comparison, folder: Path, case: int) -> list[str]:
    """One prompt's clips, row by row: the dense one first, then density by density, the best first."""
    prompt, seed = comparison.cases[case]
    groups = [(f"density {density:g}", comparison.at(density)) for density in comparison.densities]
    groups.append(("other densities", comparison.others))
    parts = [f"<section><h2>{_text(prompt)}, seed {seed}</h2>"]
    for title, rows in groups:
        figures = [_figure(folder, "dense", case, "dense", "")]
        for row in rows:
            psnr = row.values("psnr").get(case)
            told = "-" if psnr is None else f"{psnr:.1f} dB"
            figures.append(_figure(folder, row.key, case, row.name, told))
        found = [figure for figure in figures if figure is not None]
        if len(found) > 1:
            parts += [f"<h3>{title}</h3>", '<div class="clips">', *found, "</div>"]
    return [*parts, "</section>"]


def _figure(folder: Path, key: str, case: int, name: str, told: str) -> str | None:
    file = find_picture(folder / "clips" / f"{key}-{case:04d}")
    if file is None:
        return None
    source = _data(file.read_bytes(), file.suffix[1:])
    caption = f"{_text(name)} <span>{_text(told)}</span>"
    return f'<figure><img alt="{_text(name)}" src="{source}"><figcaption>{caption}</figcaption></figure>'
