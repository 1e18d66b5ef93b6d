"""The tables that the CPU backend keeps: made once per layout, never of another one, freed with it, and bounded."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.kernels import reference_attention, sparse_attention
from diffsparse.kernels.backends.cpu import rows as cpu_rows
from tests.kernels.cases import head, inputs, random_layout
from tests.tolerance import ATTENTION, assert_near

GRID = TokenGrid(2, 9, 13)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The heads whose tables were built, in turn; tables held by other tests are out of the way."""
    monkeypatch.setattr(cpu_rows, "_tables", cpu_rows._Tables(cpu_rows._MAX_TABLE_BYTES))
    built: list[int] = []
    build = cpu_rows._build

    def counted(call, head, *rest):  # type: ignore[no-untyped-def]
        built.append(head)
        return build(call, head, *rest)

    monkeypatch.setattr(cpu_rows, "_build", counted)
    return built


def run(layout, q, k, v):  # type: ignore[no-untyped-def]
    out = sparse_attention(q, k, v, layout, backend="cpu")
    assert_near(out.double(), reference_attention(q, k, v, layout)[0], ATTENTION)


def test_made_once_for_a_layout(builds: list[int]) -> None:
    q, k, v = inputs(GRID, 2, 16)
    layout = random_layout(GRID, [head(), head(tail="centroids")], 64, 0.4)
    for _ in range(3):
        run(layout, q, k, v)
    assert builds == [0, 1]


def test_text_masks_share_the_tables(builds: list[int]) -> None:
    grid = TokenGrid(1, 9, 13, text_after=70)
    q, k, v = inputs(grid, 1, 16)
    layout = random_layout(grid, [head()], 64, 0.6)
    for length in (grid.seq_len, grid.seq_len - 30, grid.seq_len):
        kv_len = torch.tensor([length], dtype=torch.int32)
        out = sparse_attention(q, k, v, layout, kv_len=kv_len, backend="cpu")
        want = reference_attention(q, k, v, layout, kv_len=kv_len)[0]
        assert_near(out.double(), want, ATTENTION)
    assert builds == [0]


def test_another_layout_and_another_number_of_threads_are_told_apart(builds: list[int]) -> None:
    q, k, v = inputs(GRID, 1, 16)
    for seed in range(20):  # ids of dead tensors come back
        run(random_layout(GRID, [head()], 64, 0.4, seed), q, k, v)
    assert len(builds) == 20
    layout = random_layout(GRID, [head()], 64, 0.4)
    run(layout, q, k, v)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        run(layout, q, k, v)
    finally:
        torch.set_num_threads(threads)
    assert len(builds) == 22


def test_a_list_changed_in_place_is_seen(builds: list[int]) -> None:
    q, k, v = inputs(GRID, 1, 16)
    layout = random_layout(GRID, [head()], 64, 0.4)
    run(layout, q, k, v)
    kept = layout.index.row_ptr[0].tolist()
    row = next(i for i in range(len(kept) - 1) if kept[i + 1] - kept[i] == 1)
    layout.index.col_idx[kept[row]] = (int(layout.index.col_idx[kept[row]]) + 1) % (len(kept) - 1)
    run(layout, q, k, v)
    assert len(builds) == 2


def test_freed_with_the_layout(builds: list[int]) -> None:
    q, k, v = inputs(GRID, 2, 16)
    layout = random_layout(GRID, [head(), head(tail="mean")], 64, 0.4)
    run(layout, q, k, v)
    held = cpu_rows._tables._held
    tables = [weakref.ref(entry[1].key_token) for entry in held.values()]
    assert len(tables) == 2
    del layout
    gc.collect()
    assert not held
    assert cpu_rows._tables._bytes == 0
    assert all(table() is None for table in tables)


def test_what_was_used_last_stays(builds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(GRID, 1, 16)
    layouts = [random_layout(GRID, [head()], 64, 0.4, seed) for seed in range(3)]
    run(layouts[0], q, k, v)
    one = cpu_rows._tables._bytes
    monkeypatch.setattr(cpu_rows._tables, "_max_bytes", int(2.5 * one))
    run(layouts[1], q, k, v)
    run(layouts[0], q, k, v)
    run(layouts[2], q, k, v)  # the second one goes
    run(layouts[0], q, k, v)
    assert len(builds) == 3
    run(layouts[1], q, k, v)
    assert len(builds) == 4
    assert cpu_rows._tables._bytes <= 2.5 * one
    # One that is too large alone is held until the next one comes.
    monkeypatch.setattr(cpu_rows._tables, "_max_bytes", 1)
    run(layouts[1], q, k, v)
    run(layouts[2], q, k, v)
    run(layouts[2], q, k, v)
    assert len(cpu_rows._tables._held) <= 1


def test_inference_mode(builds: list[int]) -> None:
    with torch.inference_mode():
        q, k, v = inputs(GRID, 1, 16)
        layout = random_layout(GRID, [head()], 64, 0.4)
        run(layout, q, k, v)
        run(layout, q, k, v)
    assert builds == [0]
