"""Plan files come from other people: whatever is in one, it reads as a plan that works or is refused in one line."""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffsparse.grid import TokenGrid
from diffsparse.limits import MAX_ENTRIES, MAX_JSON_VALUES
from diffsparse.messages import one_line, shown
from diffsparse.patterns import pattern_kinds
from diffsparse.plan import PlanError, SparsityPlan

GOLDEN = Path(__file__).parent / "golden"
# How many mutations of each; the second has more heads to build.
FOLDERS = {GOLDEN / "v1": 1200, GOLDEN / "v1_patterns": 500}
SMALL = TokenGrid(2, 3, 5, text_after=3)

# What a value is replaced by: of every type, too large, too small, not what it seems.
ODD = [
    None, True, False, 0, 1, -1, 2, 3, 63, 64, 64.0, 0.5, -0.5, 1.5, 10**6, 10**9, 2**31, 2**63, 10**30, -(10**30),
    1e-300, 1e300, "", "x", "raster", "HWF", "curve", "tile(1,8,8)", "tile(9,9,9)", "phase(frame)", "phase(7)", "0",
    "0 1", "code", "frame", "\x1b[31m\n\r", "\u202e", "é" * 10_000, "9" * 5000, [], [[]], {}, [0], [1, 2, 3],
    [0.5, 0.5, 0.5], [None, None, None], [1] * 10_000, {"kind": "full"}, {"kind": "union", "parts": []},
    {"kind": "radial", "rule": "code"}, {"kind": "sink", "frames": 1}, {"a" * 300: {"b": [1]}},
]  # fmt: skip


def places(value, path=()):
    """Paths of everything in a JSON value."""
    found = [path] if path else []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        found += places(item, (*path, key))
    return found


def at(value, path):
    for key in path:
        value = value[key]
    return value


def mutate(data, draw):
    paths = places(data)
    numbers = [path for path in paths if type(at(data, path)) in (int, float)]
    path = draw.choice(numbers if numbers and draw.random() < 0.5 else paths)
    parent, key = at(data, path[:-1]), path[-1]
    what = draw.randrange(8)
    if type(parent[key]) in (int, float) and draw.random() < 0.7:
        parent[key] = draw.choice([parent[key] + 1, parent[key] - 1, parent[key] * 2, parent[key] // 2, 0, 1])
    elif what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif what == 1:
        parent[draw.choice(["speed", "\x1b[0m", "kind", "bits"])] = draw.choice(ODD)
    elif what == 2:
        parent[key] = copy.deepcopy(at(data, draw.choice(places(data))))
    elif what == 3 and isinstance(parent[key], dict) and "kind" in parent[key]:
        parent[key]["kind"] = draw.choice(list(pattern_kinds()))
    else:
        parent[key] = copy.deepcopy(draw.choice(ODD))


def works(plan: SparsityPlan) -> None:
    """It builds every layout on a small grid, and says what it costs there."""
    heads = plan.index.shape[2]
    for phase in range(min(3, plan.schedule.num_phases)):
        for layer in plan.layers[:3]:
            layout = plan.layout(phase, layer, heads, SMALL)
            assert layout is None or 0 <= layout.density <= 1
    assert 0 <= plan.trajectory_density(SMALL, [1.0, 0.5, 0.2], plan.layers[:3], heads) <= 1
    assert str(plan.entries[0])
    plan.carried(SMALL)
    plan.to_files()


@pytest.mark.parametrize(("folder", "mutations"), FOLDERS.items(), ids=lambda value: getattr(value, "name", ""))
def test_mutated_files_read_as_plans_that_work_or_are_refused_in_one_line(folder, mutations):
    draw = random.Random(0)
    whole = json.loads((folder / "sparse_plan.json").read_text())
    arrays = load_file(folder / "sparse_plan.safetensors")
    read = refused = 0
    for _ in range(mutations):
        data = copy.deepcopy(whole)
        for _ in range(draw.choice([1, 1, 1, 2, 4])):
            if places(data):
                mutate(data, draw)
        if isinstance(data.get("architecture"), dict):
            data["architecture"].pop("fingerprint", None)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                plan = SparsityPlan.from_json(json.dumps(data).encode(), arrays)
            except PlanError as error:
                refused += 1
                text = str(error)
                assert len(text) <= 320, text
                assert text.isprintable(), text
                continue
            works(plan)
            read += 1
        assert len(said) <= 1
    # The test would say nothing if all were refused, or none.
    assert read > mutations // 10
    assert refused > mutations // 5


# Run where memory is bounded: what is told, or that it was read.
BOUNDED = """
import resource, sys, time
from diffsparse.plan import PlanError, SparsityPlan
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
begin = time.process_time()
with open("/proc/self/statm") as statm:
    size = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]), size + int(sys.argv[2])))
try:
    SparsityPlan.from_pretrained(sys.argv[1])
    print("read")
except PlanError as error:
    print(error)
print(time.process_time() - begin)
"""
MEMORY = 800 * 2**20

BITMAP = {"kind": "bitmap", "grid": [1, 8, 8], "order": "raster", "block_size": 64, "bits": "bitmap_0"}


def uniform(**changes) -> dict:
    data = json.loads(
        SparsityPlan.uniform(SparsityPlan.from_pretrained(GOLDEN / "v1").entries[3]).to_files()["sparse_plan.json"]
    )
    return data | changes


def huge() -> dict[str, tuple[dict | str, str]]:
    deep: dict = {"kind": "full"}
    for _ in range(17):
        deep = {"kind": "union", "parts": [deep]}
    wide = {"kind": "union", "parts": [{"kind": "full"}] * 300}
    return {
        "a grid of 400 million tokens": (
            uniform(entries=[{"pattern": BITMAP | {"grid": [1, 20000, 20000]}}]),
            "tokens",
        ),
        "a grid of 10^90 tokens": (uniform(entries=[{"pattern": BITMAP | {"grid": [10**30] * 3}}]), "tokens"),
        "a bitmap in blocks of one token": (
            uniform(entries=[{"pattern": BITMAP | {"grid": [1, 512, 512], "block_size": 1}}]),
            "pairs of blocks",
        ),
        "300,000 entries": (uniform(entries=[{}] * 300_000), f"at most {MAX_ENTRIES:,} are read"),
        "three million heads": (uniform(index=[["0 " * 3_000_000]]), "over all layers and phases"),
        "a million phases": (uniform(index=[["0"]] * 1_000_000), "the plan has 1 phases"),
        "four million empty objects": (uniform(record={"x": [{}] * 4_000_000}), f"{MAX_JSON_VALUES:,} values"),
        "a name of 50 MB": (uniform(layers=["x" * 50_000_000]), "name of at most"),
        "a deep record": (json.dumps(uniform())[:-1] + ', "x": ' + "[" * 200_000, "not valid JSON"),
        "a deep pattern": (uniform(entries=[{"pattern": deep}]), "nested more than"),
        "a wide pattern": (uniform(entries=[{"pattern": wide}]), "patterns in it"),
        "many boxes": (
            uniform(entries=[{"pattern": {"kind": "columns", "boxes": [[0, 1, 0, 1, 0, 1]] * 100_000}}]),
            "at most 8,192 items",
        ),
        "many unknown keys": (uniform(**{f"key{i}": 0 for i in range(200_000)}), "and 199997 more"),
        "many unknown keys that are ignorable": (
            uniform(**{f"key{i}": 0 for i in range(100_000)}, ignorable=[f"key{i}" for i in range(100_000)]),
            "read",
        ),
        "70 MB of spaces": (json.dumps(uniform()) + " " * 70_000_000, "larger than 64 MiB"),
    }


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the bound on memory needs Linux")
@pytest.mark.slow(reason="fifteen files of up to 70 MB, each read in a process of its own")
def test_huge_files_take_little_memory_and_time(tmp_path):
    save_file({"bitmap_0": np.zeros(8, np.uint8)}, tmp_path / "sparse_plan.safetensors")
    for name, (data, told) in huge().items():
        (tmp_path / "sparse_plan.json").write_text(data if isinstance(data, str) else json.dumps(data))
        done = subprocess.run(
            [sys.executable, "-W", "always", "-c", BOUNDED, str(tmp_path), str(MEMORY)], capture_output=True, text=True
        )
        assert done.returncode == 0, (name, done.stderr[-500:])
        message, seconds = done.stdout.splitlines()
        assert re.search(told, message), (name, message)
        assert len(message) < 320, (name, len(message))
        assert len(done.stderr) < 700, (name, done.stderr[:1000])
        assert float(seconds) < 5, (name, seconds)


def test_a_large_models_plan_with_a_bitmap_for_every_head_reads_quickly(tmp_path):
    """Four phases of 60 layers of 40 heads, no two alike."""
    layers, heads, blocks = 60, 40, 32
    rng = np.random.default_rng(0)
    data = uniform(
        layers=[f"blocks.{i}.attn1" for i in range(layers)],
        schedule={"phase_bounds": [0.8, 0.5, 0.2]},
        entries=[
            {
                "order": "tile(1,8,8)",
                "pattern": BITMAP
                | {"grid": [2, 32, 32], "order": "tile(1,8,8)", "bits": f"bitmap_{i}"}
                | {"fallback": {"kind": "window", "size": [1, 0.2, None], "stride": [1, 1, 1]}},
                "selection": "static",
                "execution": {"mode": "exact", "tail": "moments", "numerics": "auto"},
            }
            for i in range(4 * layers * heads)
        ],
        index=[
            [" ".join(str((p * layers + n) * heads + h) for h in range(heads)) for n in range(layers)] for p in range(4)
        ],
    )
    (tmp_path / "sparse_plan.json").write_text(json.dumps(data, indent=1))
    bits = rng.integers(0, 256, (len(data["entries"]), blocks * blocks // 8), np.uint8)
    save_file({f"bitmap_{i}": row for i, row in enumerate(bits)}, tmp_path / "sparse_plan.safetensors")
    begin = time.process_time()
    plan = SparsityPlan.from_pretrained(tmp_path)
    seconds = time.process_time() - begin
    assert len(set(plan.entries)) == 9600
    assert plan.index.shape == (4, layers, heads)
    kept = plan.layout(3, "blocks.59.attn1", heads, TokenGrid(2, 32, 32)).mask(39).numpy()
    assert np.array_equal(np.packbits(kept), bits[-1])
    assert seconds < 5, seconds  # about 1 s of one core


def test_files_that_are_too_large_are_not_opened(tmp_path):
    (tmp_path / "sparse_plan.json").write_text(json.dumps(uniform()))
    with (tmp_path / "sparse_plan.safetensors").open("wb") as file:
        file.truncate(5 * 2**30)  # takes no room on the disk
    with pytest.raises(PlanError, match="larger than 4096 MiB"):
        SparsityPlan.from_pretrained(tmp_path)


def test_entries_that_name_one_array_share_its_bytes():
    grid = [1, 512, 512]  # 4096 blocks: 2 MiB
    bits = np.zeros(4096 * 4096 // 8, np.uint8)
    data = uniform(entries=[{"pattern": BITMAP | {"grid": grid}, "execution": {"tail": t}} for t in ("none", "mean")])
    plan = SparsityPlan.from_json(json.dumps(data).encode(), {"bitmap_0": bits})
    assert plan.entries[0].pattern.bits is plan.entries[1].pattern.bits
    for wrong in (bits.astype(np.int16), bits.reshape(2, -1)):
        with pytest.raises(PlanError, match=r"must be uint8 \[bytes\]"):
            SparsityPlan.from_json(json.dumps(data).encode(), {"bitmap_0": wrong})


@pytest.mark.parametrize("name", ["x" * 5000, "a\x00b", "\x1b[31m"])
def test_names_that_are_no_folder_are_refused_in_one_line(name):
    with pytest.raises(PlanError) as caught:
        SparsityPlan.from_pretrained(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_what_is_shown_is_short_and_on_one_line():
    for value in ("x" * 10**6, "\x1b[31m\n", list(range(10**5)), {"a": "b" * 10**5}, 10**4000, [[[[[[1]]]]]], None):
        assert len(shown(value)) <= 80
        assert shown(value).isprintable()
    assert shown("\x1b[31m") == "'\\x1b[31m'"
    assert shown(64.0) == "64.0"
    assert one_line("a\nb\u2028\ud800") == "a\\nb\\u2028\\ud800"
    assert one_line("head" + "x" * 1000 + "tail", 60).startswith("head")
    assert one_line("head" + "x" * 1000 + "tail", 60).endswith("tail")
