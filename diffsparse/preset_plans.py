"""Ready-made plans by name: no search, any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffsparse.entry import Execution, HeadEntry
from diffsparse.messages import shown
from diffsparse.online import OnlineRepair
from diffsparse.order import RasterOrder, TileOrder
from diffsparse.patterns import Radial, Window
from diffsparse.plan import SparsityPlan
from diffsparse.published import PUBLISHED
from diffsparse.schedule import Schedule
from diffsparse.selection import Budget, OnlineSelection

__all__ = ["PRESETS", "presets", "preset"]

_OWN = {
    "dense": "everything dense, to try the attaching alone",
    "window": "one window for all heads, on tiles, with a tail",
    "radial": "a window that halves with the distance in frames (arXiv 2506.19852)",
    "conservative": "a wide window with a tail; nothing is picked",
    "online": "blocks of which a mean would tell least, picked in every call: what plan='auto' takes without a search",
}
# The options of ``online``, with their defaults; its exact rows for a repair; and the noise levels at which its density
# falls. What is wrong early is carried through all later steps.
_ONLINE = {"density": 0.25, "fall": 1.8, "parts": 16, "tail": "mean"}
_ONLINE_ROWS = 64
_FALLS = (0.93, 0.6)
PRESETS = (*_OWN, *PUBLISHED)


def presets() -> dict[str, str]:
    """Every preset by name, with one line on what it does and where it is from."""
    return _OWN | {name: method.line for name, method in PUBLISHED.items()}


def preset(
    name: str,
    *,
    images: bool = False,
    sparse_below: float | None = None,
    dense_layers: tuple[str, ...] = (),
    block_size: int | None = None,
    repair_rows: int | None = None,
    densities: Mapping[str, Sequence[float]] | None = None,
    **options: Any,
) -> SparsityPlan:
    """A plan that serves any model.

    ``dense``: everything dense, to try the attaching alone.
    ``window``: one neighbourhood for all heads on tiles of one frame. Options: ``size`` (default (0.5, 0.4, 0.4), per
    axis a fraction or latent units), ``stride``, ``dilation``, ``tail`` (default ``moments``).
    ``radial``: radial attention in raster order. Options: ``decay``, ``rule`` (``paper`` or ``code``), ``sink_frames``,
    ``tail`` (default ``none``, as published), ``tile`` (three numbers: tiles of that size, not raster order).
    ``conservative``: a window of ``size`` (0.6, 0.5, 0.5): each query sees 60% of the frames and 50% of the rows and
    columns around it exactly and the rest through block summaries. Options as those of ``window``.

    ``online``: what ``plan="auto"`` uses where no searched plan is known. In every call, of all pairs of blocks of a
    layer's heads the share ``density`` (default 0.25) for which the tail ``mean`` would err most by the rule
    ``tail_error``, on tiles of one frame; ``fall`` times as many at noise levels above 0.93, and as many times fewer
    from 0.6 on (default 1.8; 1 for the same share everywhere); and an online repair from 64 exact rows. Options:
    ``density``, ``fall``, ``parts``, ``tail``.

    The others are published methods with their authors' settings, of which :func:`presets` has a line each:
    ``xattention`` (options ``tau``, ``stride``), ``adaspa`` (``density``, ``rows``, ``search_at``), ``sparsed``
    (``density``, ``rows``), ``minference`` (``density``, ``rows``), ``draft`` (``density``), ``blade`` (``mass``,
    ``least``, ``most``, ``samples``), ``sla`` (``density``), ``vmoba`` (``tau``), ``sol`` (``tau``), ``subblock``
    (``density``, ``parts``), ``gna`` (``size``, ``stride``), ``sta`` (``size``, ``tile``), ``sparge`` (``tau``,
    ``similarity``), ``svg`` (``density``, ``rows``), ``lite`` (``threshold``, ``samples``), ``sparsepr`` (``density``,
    ``parts``), ``flexprefill`` (``gamma``, ``tau``, ``rows``), ``sale`` (``tau``, ``samples``), ``anchor``
    (``theta``), ``proxyattn`` (``gamma``, ``heads``, ``samples``) and ``hip`` (``density``, ``samples``); each has
    ``tail`` too. ``diffsparse.published`` says of
    each what is faithful and what is not.

    images: the plan is for a model that makes images. ``radial`` is on square tiles then: a block of raster order is a
    piece of a row, and up to 2048 x 2048 pixels all are kept. Where a name is given instead of a plan, as in
    ``enable_sparse_attention(pipe, "radial")``, the model decides.

    repair_rows: outputs are repaired in every call from so many exact rows (:class:`diffsparse.OnlineRepair`; 256 is a
    usual number). None: they are not, or as the method has it; 0: they are not.

    densities: by layer, of each head the share of the blocks that a row keeps: a profile that was measured before, such
    as ``plan.layout(0, layer, heads, grid).densities`` of a searched plan. The preset's rule picks as many, whatever
    its own budget; layers that are not named stay dense. Raises ValueError for presets that pick nothing.

    Steps at a noise level above ``sparse_below`` stay dense (default 0.9, ``conservative`` 0.85, ``online`` 1: the
    first steps decide what the picture becomes; published methods have their own), as do ``dense_layers``. block_size:
    tokens of a block; 64 where None, or the method's own. Raises ValueError for other names and TypeError for options
    that the preset does not have.
    """
    method = PUBLISHED.get(name)
    if sparse_below is None:
        own = {"conservative": 0.85, "online": 1.0}.get(name, 0.9)
        sparse_below = own if method is None else method.sparse_below
    if block_size is None:
        block_size = 64 if method is None else method.block_size
    schedule = Schedule(sparse_below=sparse_below, dense_layers=tuple(dense_layers))
    later: list[HeadEntry] = []
    if method is not None:
        entry = method.entry(block_size, **options)
    elif name == "dense":
        if refused := sorted(options) + ["repair_rows"] * (repair_rows is not None):
            raise TypeError(f"preset('dense') takes no {', '.join(refused)}")
        entry = HeadEntry()
    elif name in ("window", "conservative"):
        tail = options.pop("tail", "moments")
        options.setdefault("size", (0.5, 0.4, 0.4) if name == "window" else (0.6, 0.5, 0.5))
        tile = TileOrder(1, 8, 8) if block_size == 64 else TileOrder(2, 8, 8)
        entry = HeadEntry(tile, Window(**{k: tuple(v) for k, v in options.items()}), execution=Execution(tail=tail))
    elif name == "online":
        entry, later, schedule = _online(block_size, schedule, options)
        repair_rows = _ONLINE_ROWS if repair_rows is None else repair_rows
    elif name == "radial":
        square = (1, 8, 8) if block_size == 64 else (1, 8, 16)
        tail, sizes = options.pop("tail", "none"), options.pop("tile", square if images else None)
        order = RasterOrder() if sizes is None else TileOrder(*sizes)
        entry = HeadEntry(order, Radial(**options), execution=Execution(tail=tail))
    else:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    if repair_rows is None and method is not None:
        repair_rows = method.repair_rows
    repair = OnlineRepair(repair_rows) if repair_rows else None
    record = {"preset": name}
    if densities is not None:
        rule = entry.online
        if rule is None:
            raise ValueError(f"densities are for presets that pick blocks while the model runs; {name!r} does not")
        schedule = replace(schedule, phase_bounds=())  # a profile says how much, at every step
        table = {layer: [[_with_density(entry, rule, share) for share in heads]] for layer, heads in densities.items()}
        return SparsityPlan.from_table(table, schedule=schedule, block_size=block_size, record=record, repair=repair)
    return SparsityPlan.uniform(entry, *later, schedule=schedule, block_size=block_size, record=record, repair=repair)


def _online(
    block_size: int, schedule: Schedule, options: dict[str, Any]
) -> tuple[HeadEntry, list[HeadEntry], Schedule]:
    """The entries of ``online``, one for each phase of the schedule that comes back."""
    density, fall, parts, tail = (options.pop(key, default) for key, default in _ONLINE.items())
    if options:
        raise TypeError(f"preset('online') takes no {', '.join(sorted(options))}")
    if not isinstance(fall, (int, float)) or not 1 <= fall <= 10:
        raise ValueError(f"fall says how many times more is kept at first, from 1 to 10; got {shown(fall)}")
    Budget("best_heads", density)  # says what is wrong with it
    tile = TileOrder(1, 8, 8) if block_size == 64 else TileOrder(1, 8, 16)

    def entry(share: float) -> HeadEntry:
        picking = OnlineSelection("tail_error", Budget("best_heads", min(1.0, share)), (("parts", parts),))
        return HeadEntry(tile, selection=picking, execution=Execution(tail=tail))

    if fall == 1:
        return entry(density), [], schedule
    # Where the first steps are dense there are fewer phases.
    bounds = tuple(level for level in _FALLS if schedule.dense_below < level < schedule.sparse_below)
    first, *later = [entry(share) for share in (density * fall, density, density / fall)][len(_FALLS) - len(bounds) :]
    return first, later, replace(schedule, phase_bounds=bounds)


def _with_density(entry: HeadEntry, rule: OnlineSelection, share: float) -> HeadEntry:
    budget = Budget("density", share)
    values = dict(rule.parameters)
    if "share" in values:  # of rules that have to know it
        values["share"] = share
    return replace(entry, selection=replace(rule, budget=budget, parameters=tuple(values.items())))
