"""Tables in plain text that fit the terminal: they read the same there, in a log and in an issue.

A table that is too wide first loses columns that say nothing, then its longest cells are folded, at spaces where that
is possible. Nothing that a cell says is left out. Where not even that fits, each row becomes a few lines with its cells
one after the other.
"""

from __future__ import annotations

import io
import re
import shutil
import textwrap
from collections.abc import Collection, Sequence

from rich.cells import cell_len

__all__ = ["GLUE", "fold", "printable", "shorten", "terminal_width", "text_table"]

#: A space at which no line is broken as long as there is another place; it is printed as a space.
GLUE = "\u00a0"
_GAP = "  "
#: A cell that says nothing; a column of them may go.
_EMPTY = ("", "-")
#: Words up to the first length are not broken where there is room; in columns narrower than the second they would be
#: hard to read.
_COMFORTABLE, _LEAST = 14, 9
#: No terminal is narrower.
_NARROWEST = 24
# Where a word that is too long for its column is best broken: behind these, and where a class's name has a capital.
_PIECES = re.compile(r"(?<=[._/|&,:;-])|(?<=[A-Za-z0-9])(?=[A-Z][a-z])")
_SPACES = re.compile(f"[ {GLUE}]+")


def terminal_width() -> int:
    """Columns of the terminal that standard output goes to; 80 for a file or a pipe. ``COLUMNS`` overrides both."""
    return max(_NARROWEST, shutil.get_terminal_size((80, 24)).columns)


def printable(text: str) -> str:
    """The text without what a terminal would obey: names in a plan come from a file of somebody else."""
    return "".join(c if c.isprintable() or c == GLUE else "\ufffd" for c in text)


def shorten(text: str, width: int) -> str:
    """One line of at most ``width`` characters."""
    text = " ".join(text.split())
    short = textwrap.shorten(text, width, placeholder="…")
    return short if len(short) > 1 or len(text) <= 1 else text[: width - 1] + "…"


def fold(text: str, width: int | None = None, indent: str = "") -> str:
    """The text in lines of at most ``width`` cells (None: the terminal's), all but the first after ``indent``."""
    width = terminal_width() if width is None else width
    return "\n".join(_lines(printable(text), width, indent)).replace(GLUE, " ")


def text_table(
    rows: Sequence[Sequence[str]],
    header: Sequence[str] | None = None,
    right: Collection[int] = (),
    *,
    names: int | None = None,
    styles: Sequence[str] | None = None,
    width: int | None = None,
) -> str:
    """Columns two spaces apart, in lines of at most ``width`` cells (None: the terminal's).

    Args:
        rows: the cells; characters that a terminal would obey are replaced.
        header: names of the columns.
        right: columns that are aligned to the right.
        names: a column that people copy or search for. It is never broken: where it does not fit beside the others,
            each of its cells stands above its rows, on a line of its own (broken only where the terminal is narrower).
        styles: of the columns, as rich names them, for a terminal with colours (none where ``NO_COLOR`` is set).
    """
    width = terminal_width() if width is None else max(_NARROWEST, width)
    lines = [[printable(cell) for cell in row] for row in ([header] if header else []) + list(rows)]
    if not lines:
        return ""
    body = bool(header)

    def fit(columns: Sequence[int], whole: int | None = None) -> tuple[list[list[str]], set[int], list[int] | None]:
        shown = [[line[i] for i in columns] for line in lines]
        at_right = {j for j, i in enumerate(columns) if i in right}
        return shown, at_right, _widths(shown, at_right, body, width, None if whole is None else columns.index(whole))

    kept = _told(lines, body, width)
    above: list[list[str]] = []
    shown, at_right, widths = fit(kept, names)
    if widths is None and names is not None:
        above = [_lines(line[names], width) for line in lines[body:]]
        kept = [i for i in kept if i != names]
        shown, at_right, widths = fit(kept)
    if widths is None:
        return _stacked(shown, body, width, above)
    chosen = None if styles is None else [styles[i] if i < len(styles) else "" for i in kept]
    named = styles[names] if styles and above and names is not None and names < len(styles) else ""
    return _rendered(shown, body, at_right, widths, chosen, above, named)


def _natural(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(cell_len(line[i]) for line in lines) for i in range(len(lines[0]))]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _told(lines: Sequence[Sequence[str]], header: bool, width: int) -> list[int]:
    """The columns to show: all where they fit, else those with anything in them."""
    everything = list(range(len(lines[0])))
    if not header or len(lines) == 1 or _total(_natural(lines)) <= width:
        return everything
    return [i for i in everything if any(line[i] not in _EMPTY for line in lines[1:])] or everything


def _widths(
    lines: Sequence[Sequence[str]], right: Collection[int], header: bool, width: int, whole: int | None = None
) -> list[int] | None:
    """A width for each column so that a line fits, or None where there is none: the widest ones give way first, the
    column ``whole`` not at all."""
    natural = _natural(lines)
    if _total(natural) <= width:
        return natural
    words = [max(cell_len(word) for line in lines for word in _SPACES.split(line[i])) for i in range(len(natural))]
    for least in range(_COMFORTABLE, _LEAST - 1, -1):
        # Numbers are never broken, and neither are the names in a table of names and values.
        found = [min(word, _NARROWEST if i in right else least) for i, word in enumerate(words)]
        if not header:
            found[:-1] = natural[:-1]
        if whole is not None:
            found[whole] = natural[whole]
        room = width - _total(found)
        if room < 0:
            continue
        # Cell by cell to the narrowest column that is short of room: first for what is in them, then for their names.
        for wanted in (_natural(lines[1:] or lines) if header else natural, natural):
            while room and (short := [i for i, w in enumerate(found) if w < wanted[i]]):
                found[min(short, key=lambda i: found[i])] += 1
                room -= 1
        return found
    return None


def _rendered(
    lines: Sequence[Sequence[str]],
    header: bool,
    right: Collection[int],
    widths: Sequence[int],
    styles: Sequence[str] | None,
    above: Sequence[Sequence[str]] = (),
    named: str = "",
) -> str:
    """``above``: lines over each row, once over rows that follow each other; ``named``: their style."""
    folded = [[_lines(cell, width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    styles, coloured = styles or [""] * len(widths), styles is not None
    out: list[list[tuple[str, str]]] = []
    for n, row in enumerate(folded):
        title = header and n == 0
        k = n - header
        if above and not title and (k == 0 or above[k] != above[k - 1]):
            out += [[(line, named)] for line in above[k]]
        for i in range(max(map(len, row))):
            cells = [_padded(c[i] if i < len(c) else "", widths[j], j in right) for j, c in enumerate(row)]
            out.append([(cell, "bold" if title else styles[j]) for j, cell in enumerate(cells)])
        if title:
            out.append([("-" * w, "bold") for w in widths])
    if not coloured:
        return "\n".join(_GAP.join(cell for cell, _ in cells).rstrip() for cells in out).replace(GLUE, " ")
    return _coloured(out)


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def _coloured(lines: Sequence[Sequence[tuple[str, str]]]) -> str:
    from rich.console import Console
    from rich.text import Text

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=1 << 16)
    for cells in lines:
        line = Text()
        for i, (cell, style) in enumerate(cells):
            line.append(_GAP if i else "").append(cell, style)
        line.rstrip()
        console.print(line, soft_wrap=True)
    return out.getvalue().rstrip("\n")


def _stacked(lines: Sequence[Sequence[str]], header: bool, width: int, above: Sequence[Sequence[str]]) -> str:
    """Each row as a few lines: its cells one after the other, named where there is a header."""
    names, rows = (lines[0], lines[1:]) if header else ([""] * len(lines[0]), lines)
    out: list[str] = []
    for k, row in enumerate(rows):
        if above and (k == 0 or above[k] != above[k - 1]):
            out += above[k]
        cells = " | ".join(f"{name}: {cell}" if name else cell for name, cell in zip(names, row, strict=True) if cell)
        out.append(fold(f"{_GAP if above else ''}{cells}", width, _GAP))
    return "\n".join(out)


def _lines(text: str, width: int, hang: str = "") -> list[str]:
    """A cell in lines of at most ``width`` cells, broken at spaces, in words that are too long behind punctuation, and
    else anywhere. Spaces at the beginning are kept on every line; ``hang`` comes before all lines but the first."""
    if cell_len(text) <= width:
        return [text]
    indent = text[: len(text) - len(text.lstrip())]
    indent = indent if len(indent) < width // 2 else ""
    lines: list[str] = []
    line = ""

    def room() -> int:
        return width - len(indent) - (len(hang) if lines else 0)

    for words in filter(None, text.split(" ")):
        for word in [words] if cell_len(words) <= room() else words.split(GLUE):
            whole = f"{line} {word}" if line else word
            if cell_len(whole) <= room():
                line = whole
                continue
            if line:
                lines.append(line)
            # All but the first line are shorter by what hangs before them; where this is the first, so is its word.
            *full, line = _broken(word, room() - (0 if lines else len(hang)))
            lines += full
    return [(hang if k else "") + indent + each for k, each in enumerate([*lines, line])]


def _broken(word: str, width: int) -> list[str]:
    lines, line = [], ""
    for piece in _PIECES.split(word):
        for part in [piece] if cell_len(piece) <= width else piece:
            if cell_len(line + part) > width and line:
                lines.append(line)
                line = ""
            line += part
    return [*lines, line]
