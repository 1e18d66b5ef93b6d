"""Scores of rules by their formulas: plain loops over blocks and tokens, in double."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from diffsparse.layout import BlockLayout

SCALE = 0.3

Blocks = list[torch.Tensor]  # of one head and item: the rows of each block, double [n, D]; none of an empty block


def cut(x: torch.Tensor, layout: BlockLayout, h: int) -> Blocks:
    """One item's rows ``[S, H, D]`` by the blocks of a head's order."""
    order = int(layout.tokens.head_order[h])
    border, gather = layout.tokens.block_start[order].tolist(), layout.tokens.gather[order].long()
    return [x[gather[a:b], h].double() for a, b in zip(border, border[1:])]


def evenly(block: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` rows of a block, the middles of as many equal parts; all of a block that has no more."""
    n = len(block)
    if n <= count:
        return block
    return block[[math.floor((i + 0.5) * n / count) for i in range(count)]]


def softmax_mass(q: Blocks, k: Blocks, scale: float = SCALE) -> list[list[torch.Tensor]]:
    """For each query block and key block the weights of its rows, ``[queries, keys]``; the softmax is over all keys."""
    keys, sizes = torch.cat(k), [len(block) for block in k]
    return [list((scale * rows @ keys.T).softmax(1).split(sizes, 1)) for rows in q]


def pooled(q: Blocks, k: Blocks, i: int, j: int) -> float:
    return SCALE * float(q[i].mean(0) @ k[j].mean(0))


def pooled_max(q: Blocks, k: Blocks, i: int, j: int) -> float:
    mean = q[i].mean(0)
    return SCALE * sum(max(float(m * k[j][:, c].max()), float(m * k[j][:, c].min())) for c, m in enumerate(mean))


def sub_block(q: Blocks, k: Blocks, i: int, j: int, parts: int = 4) -> float:
    def means(block: torch.Tensor) -> list[torch.Tensor]:
        of = [math.floor(t * parts / len(block)) for t in range(len(block))]
        runs = [[t for t in range(len(block)) if of[t] == p] for p in range(parts)]
        return [block[run].mean(0) for run in runs if run]

    return math.log(sum(math.exp(SCALE * float(a @ b)) for a in means(q[i]) for b in means(k[j])))


def antidiagonal_mass(q: Blocks, k: Blocks, stride: int) -> list[list[float]]:
    """The logarithm of ``sum_r sum_c softmax(mean of antidiagonals)``, group by group, product by product."""

    def groups(block: torch.Tensor) -> list[torch.Tensor]:
        return list(block.split(stride))

    logits = []
    for query in q:
        for a in groups(query):
            row = []
            for key in k:
                for b in groups(key):
                    pairs = [(stride - 1 - t, t) for t in range(stride)]
                    row.append(sum(float(a[s] @ b[t]) for s, t in pairs if s < len(a) and t < len(b)) / stride)
            logits.append(row)
    weights = (SCALE * torch.tensor(logits, dtype=torch.float64)).softmax(1)
    sizes = [[len(groups(block)) for block in side] for side in (q, k)]
    rows = weights.split(sizes[0], 0)
    return [[float(part.sum().log()) for part in row.split(sizes[1], 1)] for row in rows]


def four_bits(row: torch.Tensor) -> torch.Tensor:
    step = row.abs().max() / 7
    return step * torch.round(row / step)


def low_bit(q: Blocks, k: Blocks, first: int, samples: int = 16) -> list[list[float]]:
    few, every = ([[four_bits(row) for row in rows] for rows in x] for x in ([evenly(b, samples) for b in k], k))
    scores = []
    for i, rows in enumerate(q):
        row = [-math.inf] * len(k)
        for query in map(four_bits, evenly(rows, samples)):
            known = torch.stack([key for b in {first, i} for key in every[b]]) @ query
            total = float((SCALE * known).logsumexp(0))
            for j, block in enumerate(few):
                row[j] = max(row[j], float((SCALE * torch.stack(block) @ query).max()) - total)
        scores.append([math.inf if j in (first, i) else s for j, s in enumerate(row)])
    return scores


def anchor(q: Blocks, k: Blocks, first: int) -> list[list[float]]:
    scores = []
    for i, rows in enumerate(q):
        highest = [max(float(SCALE * query @ key) for b in {first, i} for key in k[b]) for query in rows]
        mean, at = rows.mean(0), sum(highest) / len(highest)
        row = [max(float(SCALE * mean @ key) for key in block) - at for block in k]
        scores.append([math.inf if j in (first, i) else s for j, s in enumerate(row)])
    return scores


def self_similar(q: Blocks, k: Blocks, least: float = 0.6) -> list[list[float]]:
    def alike(block: torch.Tensor) -> bool:
        cosines = [[float(a @ b / a.norm() / b.norm()) for a in block] for b in block]
        return sum(map(sum, cosines)) / len(block) ** 2 >= least

    mixed = [[not alike(block) for block in side] for side in (q, k)]
    n = len(q)
    return [[math.inf if mixed[0][i] or mixed[1][j] else pooled(q, k, i, j) for j in range(n)] for i in range(n)]


def tail_error(q: Blocks, k: Blocks, v: Blocks, parts: int = 16) -> list[list[float]]:
    scores = []
    for rows in q:
        mean = SCALE * rows.mean(0)
        of = [[math.floor(t * parts / len(block)) for t in range(len(block))] for block in k]
        runs = [[torch.tensor(part) == p for p in sorted(set(part))] for part in of]
        keys, values = ([torch.stack([b[r].mean(0) for r in run]) for b, run in zip(x, runs)] for x in (k, v))
        sizes = [torch.tensor([float(r.sum()) for r in run], dtype=torch.float64) for run in runs]
        total = torch.cat([key @ mean + size.log() for key, size in zip(keys, sizes)]).logsumexp(0)
        row = []
        for j, (key, value, size) in enumerate(zip(keys, values, sizes)):
            exact = (size * (key @ mean - total).exp()) @ value
            tail = len(k[j]) * float((k[j].mean(0) @ mean - total).exp()) * v[j].mean(0)
            row.append(math.log(float((exact - tail).square().sum())))
        scores.append(row)
    return scores


def tree(
    q: Blocks, k: Blocks, layout: BlockLayout, h: int, share: float = 0.125, samples: int = 4
) -> list[list[float]]:
    visual = layout.tokens.visual_blocks(int(layout.tokens.head_order[h])).nonzero().flatten().tolist()
    first, count = visual[0], len(visual)
    scores = [[0.0] * len(k) for _ in q]
    for i in visual:
        size = 2 ** max(0, math.floor(math.log2(0.5 / share)))
        nodes = list(range(math.ceil(count / size)))
        behind = {j: 0.0 for j in visual}
        while True:
            found = {}
            for node in nodes:
                middle = k[min(first + node * size + size // 2, first + count - 1)]
                key = middle[len(middle) // 2]
                found[node] = max(float(SCALE * query @ key) for query in evenly(q[i], samples))
            for j in visual:
                node = (j - first) // size
                behind[j] = found[node] if node in found else behind[j] - 1e5
            if size == 1:
                break
            best = sorted(nodes, key=lambda node: (-found[node], node))[: max(1, math.ceil(share * count - 1e-9))]
            size //= 2
            nodes = [child for node in sorted(best) for child in (2 * node, 2 * node + 1) if child * size < count]
        for j in visual:
            scores[i][j] = behind[j]
    return scores


def proxy(q: torch.Tensor, k: torch.Tensor, layout: BlockLayout, h: int) -> list[list[float]]:
    group = [g for g in range(q.shape[1]) if g // 4 == h // 4]
    shared = [[x.double()[:, group].mean(1)[rows] for rows in numbers_of(layout, h)] for x in (q, k)]
    few = [[evenly(b, 16) for b in side] for side in shared]
    ranked = [[float(w.max()) for w in row] for row in softmax_mass(*few)]
    own = [[x.double()[rows, h] for rows in numbers_of(layout, h)] for x in (q, k)]
    visual = [j for j in range(len(own[0])) if is_visual(layout, h, j)]
    scores = [[-math.inf] * len(own[0]) for _ in own[0]]
    for i in range(len(own[0])):
        falling = sorted((pooled(own[0], own[1], i, j) for j in visual), reverse=True)
        for j, score in zip(sorted(visual, key=lambda j: (-ranked[i][j], j)), falling):
            scores[i][j] = score
    return scores


def numbers_of(layout: BlockLayout, h: int) -> list[torch.Tensor]:
    order = int(layout.tokens.head_order[h])
    border, gather = layout.tokens.block_start[order].tolist(), layout.tokens.gather[order].long()
    return [gather[a:b] for a, b in zip(border, border[1:]) if b > a]


def is_visual(layout: BlockLayout, h: int, j: int) -> bool:
    return bool(layout.tokens.visual_blocks(int(layout.tokens.head_order[h]))[j])


def switch(
    q: Blocks, k: Blocks, layout: BlockLayout, h: int, tau: float, lines: list[list[float]]
) -> list[list[float]]:
    visual = [j for j in range(len(k)) if is_visual(layout, h, j)]
    differences = []
    for t in range(4):
        rows = evenly(q[visual[math.floor((t + 0.5) * len(visual) / 4)]], 16)
        exact = [
            sum(float(w[:, 0].sum()) for w in [m.sum(1, keepdim=True)]) / len(rows) for m in softmax_mass([rows], k)[0]
        ]
        logits = torch.stack([SCALE * rows.mean(0) @ block.mean(0) for block in k])
        guess = logits.softmax(0).tolist()
        total = 0.0
        for a, b in zip(exact, guess):
            total += sum(x * math.log(x / ((a + b) / 2)) for x in (a, b) if x > 0) / 2
        differences.append(math.sqrt(max(0.0, total)))
    if sum(differences) / 4 < tau:
        return [[pooled(q, k, i, j) for j in range(len(k))] for i in range(len(k))]
    return lines


def clusters(q: Blocks, k: Blocks, layout: BlockLayout, h: int) -> list[list[float]]:
    tokens, visual = layout.tokens, [j for j in range(len(k)) if is_visual(layout, h, j)]
    found = []
    for x, count in ((q, 32), (k, 64)):
        flat = torch.cat([x[j] for j in visual])
        centres = flat[[math.floor((c + 0.5) * tokens.num_visual / count) for c in range(count)]].clone()
        for step in range(3):
            which = torch.cdist(flat, centres).argmin(1).tolist()
            if step == 2:
                break
            for c in set(which):
                centres[c] = flat[[i for i, w in enumerate(which) if w == c]].mean(0)
        found.append((centres, dict(zip(visual, torch.tensor(which).split([len(x[j]) for j in visual])))))
    (asking, of_q), (asked, of_k) = found
    sizes = torch.stack([sum((of_k[j] == c).sum() for j in visual) for c in range(64)]).double()
    weights = (SCALE * asking @ asked.T + sizes.log()).softmax(1) / sizes  # of one key
    scores = [[-math.inf] * len(k) for _ in k]
    for i in visual:
        for j in visual:
            scores[i][j] = math.log(sum(float(weights[a][of_k[j]].sum()) for a in of_q[i]))
    return scores


def spatial_temporal(
    q: Blocks, k: Blocks, v: Blocks, layout: BlockLayout, h: int, share: float = 0.25
) -> list[list[float]]:
    grid, tokens = layout.grid, layout.tokens
    visual = [j for j in range(len(k)) if is_visual(layout, h, j)]
    centre = {}
    for j in visual:
        number = numbers_of(layout, h)[j] - tokens.text_before
        centre[j] = [
            float(x.double().mean())
            for x in (number // (grid.height * grid.width), number // grid.width % grid.height, number % grid.width)
        ]

    def far(kind: int, i: int, j: int) -> float:
        (f, y, x), (g, z, w) = centre[i], centre[j]
        frames, place = abs(f - g), math.hypot(y - z, x - w)
        return place + 1e-3 * frames / grid.frames if kind else frames + 1e-3 * place / max(grid.height, grid.width)

    rows, first = min(64, tokens.num_visual), tokens.text_before
    ends = torch.tensor([len(b) for b in q]).cumsum(0)
    errors = [0.0, 0.0]
    keys, values = torch.cat(k), torch.cat(v)
    for r in range(rows):
        place = first + math.floor((r + 0.5) * tokens.num_visual / rows)
        own = int((ends <= place).sum())
        logits = SCALE * keys @ torch.cat(q)[place]
        exact = logits.softmax(0) @ values
        for kind in (0, 1):
            # The score is in single precision, where equal distances may differ.
            near = sorted(visual, key=lambda j: (round(far(kind, own, j), 4), j))[
                : math.ceil(share * len(visual) - 1e-9)
            ]
            kept = torch.cat([torch.full((len(b),), j in near or j not in visual) for j, b in enumerate(k)])
            errors[kind] += float((logits.masked_fill(~kept, -math.inf).softmax(0) @ values - exact).square().sum())
    kind = int(errors[1] < errors[0])
    scores = [[-math.inf] * len(k) for _ in k]
    for i in visual:
        for j in visual:
            scores[i][j] = -far(kind, i, j)
    return scores


def scores_by_hand(
    name: str, item: tuple[torch.Tensor, torch.Tensor, torch.Tensor], layout: BlockLayout, h: int
) -> list[list[float]]:
    """What a rule scores between the blocks of a head that are not empty, of one item's q, k and v, ``[S, H, D]``."""
    q, k, v = (cut(x, layout, h) for x in item)
    there = [n for n, block in enumerate(k) if len(block)]
    q, k, v = ([side[n] for n in there] for side in (q, k, v))
    first_visual = layout.tokens.text_blocks[0]
    if name == "low_bit":
        return low_bit(q, k, first_visual)
    if name == "anchor":
        return anchor(q, k, first_visual)
    if name == "self_similar":
        return self_similar(q, k)
    if name == "tail_error":
        return tail_error(q, k, v)
    if name == "tree":
        return tree(q, k, layout, h)
    if name == "proxy":
        return proxy(item[0], item[1], layout, h)
    if name == "clusters":
        return clusters(q, k, layout, h)
    if name == "spatial_temporal":
        return spatial_temporal(q, k, v, layout, h)
    if name == "switch":
        return switch(q, k, layout, h, 0.1, scores_by_hand("vertical_slash", item, layout, h))
    n = len(there)
    each: dict[str, Callable[..., float]] = {"pooled": pooled, "pooled_max": pooled_max, "sub_block": sub_block}
    if name in each:
        return [[each[name](q, k, i, j) for j in range(n)] for i in range(n)]
    if name == "key_means":
        return [[float((SCALE * q[i] @ k[j].mean(0)).max()) for j in range(n)] for i in range(n)]
    if name == "antidiagonal":
        return antidiagonal_mass(q, k, 8)
    if name == "mass":
        return [[float(w.sum().log()) for w in row] for row in softmax_mass([evenly(b, 4) for b in q], k)]
    if name == "sampled_max":
        few = [[evenly(b, 16) for b in side] for side in (q, k)]
        return [[float(w.max().log()) for w in row] for row in softmax_mass(*few)]
    if name == "spread":
        visual = layout.tokens.visual_blocks(int(layout.tokens.head_order[h]))[there]
        means = torch.stack([b.mean(0) for b in k])
        centre, variance = means[visual].mean(0), means[visual].var(0, correction=0)
        queries = torch.stack([b.mean(0) for b in q])
        return ((queries @ (means - centre).T) / (queries.square() @ variance).sqrt()[:, None]).tolist()  # type: ignore
    assert name == "vertical_slash"
    first, count = layout.tokens.text_before, layout.tokens.num_visual
    rows = min(64, count)
    places = [first + math.floor((r + 0.5) * count / rows) for r in range(rows)]
    ends = torch.tensor([len(b) for b in q]).cumsum(0)
    own = [int((ends <= p).sum()) for p in places]
    mass = softmax_mass([torch.cat(q)[[p]] for p in places], k)
    share = [[float(w.sum()) for w in row] for row in mass]  # [R][n]
    column = [sum(row[j] for row in share) / rows for j in range(n)]
    lines: dict[int, list[float]] = {}
    for r, row in enumerate(share):
        for j, s in enumerate(row):
            lines.setdefault(j - own[r], []).append(s)
    slash = {d: sum(found) / len(found) for d, found in lines.items()}
    return [[math.log(column[j] + slash.get(j - i, 0.0)) for j in range(n)] for i in range(n)]
