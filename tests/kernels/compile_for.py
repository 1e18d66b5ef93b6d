"""Run in a process of its own: compile the Triton kernels for a GPU that is not there, and say what came out.

``python -m tests.kernels.compile_for 90 [--slow] [--gluon] [--repair] [--rows] [--select]`` prints a line of JSON each.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from diffsparse.grid import TokenGrid
from diffsparse.kernels.backends.triton.host import choose_config, launch, some_partial
from diffsparse.kernels.backends.triton.prepare import summaries, variance_dtype
from diffsparse.kernels.call import make_call
from diffsparse.order import TileOrder
from tests.kernels.cases import head, inputs, random_layout
from tests.kernels.mend import maps

#: Shared memory that one program may use, bytes.
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


class AbsentGpu:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def assembled(ptx: str) -> dict[str, int | bool]:
    """Bytes of registers that a thread spills, and whether the assembler put waits between asynchronous products."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, "utf-8")
        ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        ptxas.chmod(0o755)
        command = [ptxas, "-v", "-arch=sm_90a", source, "-o", source.with_suffix(".cubin")]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return {
        "spill_bytes": int(re.findall(r"(\d+) bytes spill stores", said)[0]),
        "serialized": "wgmma.mma_async instructions are serialized" in said,
    }


def compile_gluon(slow: bool) -> None:
    import triton

    from diffsparse.kernels.backends.gluon_sm90 import host, prepare, quantize, wide

    host.TWO_PASSES = 0
    grid = TokenGrid(2, 16, 16, text_after=70)
    cases = [(128, 128, torch.bfloat16, "none", False, "auto")]
    if slow:
        cases += [(d, b, torch.bfloat16, "moments", True, "auto") for d in (64, 96, 128) for b in (64, 128)]
        cases += [(64, 128, torch.float16, "none", False, "auto"), (128, 64, torch.float16, "centroids", True, "auto")]
        for numerics in ("int8", "fp8"):
            cases += [(d, 128, torch.bfloat16, "none", True, numerics) for d in (64, 128)]
            cases += [(128, b, torch.bfloat16, "centroids", True, numerics) for b in (64, 128)]
    for dim, block, dtype, tail, own_order, numerics in cases:
        entries = [head(tail=tail), head(TileOrder(1, 8, 8) if own_order else None)]
        layout = random_layout(grid, entries, block, 0.5)
        call = make_call(*inputs(grid, 2, dim, dtype=dtype), layout, return_lse=True, numerics=numerics)
        batch, seq, heads, _ = call.q.shape
        mean = call.q.new_empty(batch, heads, 2, call.num_blocks, dim)
        means = (mean, mean, mean[:, :, 0].to(variance_dtype(dtype))) if call.has_tail else None
        bias = torch.empty(heads * call.num_blocks, 2 * call.num_blocks, dtype=torch.float16)
        out, lse = torch.empty_like(call.q), torch.empty(batch, seq, heads)
        config = host.choose_config(block, dim, numerics)
        for kernel in host.launch(call, numerics, config, out, lse, means, bias, warmup=True):
            found = {
                "case": f"{dim}-{block}-{str(dtype)[6:]}-{tail}-{numerics}",
                "triton": triton.__version__,
                "shared": kernel.metadata.shared,
                "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
                "bulk": kernel.asm["ptx"].count("cp.async.bulk.tensor"),
                "barriers": kernel.asm["ptx"].count("mbarrier.init"),
                "given_up": kernel.asm["ptx"].count("mbarrier.inval"),
                **assembled(kernel.asm["ptx"]),
            }
            print(json.dumps(found), flush=True)
        if dtype == torch.bfloat16 and numerics == "auto":
            work = prepare.work_list(call, heads)
            sampled = wide.mark_wide_heads(call, work, torch.empty(9, dtype=torch.int32), heads, warmup=True)
            assert sampled.metadata.shared <= 227 << 10 and not assembled(sampled.asm["ptx"])["spill_bytes"]
        if call.tokens.needs_gather and numerics == "auto":
            copies = [torch.empty(batch, heads, seq, dim, dtype=dtype)] * 3
            for summed in (None, means) if means else (None,):
                moved = prepare.reorder(call, copies, 0, heads, summed, warmup=True)
                assert moved.metadata.shared <= 49152 and assembled(moved.asm["ptx"])["spill_bytes"] < 256
        if numerics != "auto":
            # Only whether they compile, and use the matrix units for the rotation.
            small = quantize.quantize(call, numerics, means and means[:2], warmup=True)
            assert [k.metadata.name for k in small[2:]] == ["_quantize_kernel", "_quantize_means_kernel"][
                : len(small) - 2
            ]
            assert all("wgmma.mma_async" in k.asm["ptx"] or "mma.sync" in k.asm["ptx"] for k in small[2:])


def tell(kernel: Any, case: str, capability: int) -> None:
    """Print what came out of compiling one kernel."""
    text = kernel.asm["ptx"]
    found: dict[str, Any] = {
        "kernel": kernel.metadata.name,
        "case": case,
        "shared": kernel.metadata.shared,
        "allowed": SHARED[capability],
        "wgmma": text.count("wgmma.mma_async"),
        "mma": text.count("mma.sync"),
        "tcgen05": text.count("tcgen05.mma"),
        "tf32": text.count("tf32"),
    }
    if capability == 90:
        found |= assembled(text)
    print(json.dumps(found), flush=True)


def compile_repair(capability: int, slow: bool) -> None:
    from diffsparse.kernels.repair.host import choose_tiles, launch

    dims = (16, 64, 72, 128, 160, 256) if slow else (128,)
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if slow else (torch.bfloat16, torch.float32)
    for dim, dtype, tokens in ((d, t, n) for d in dims for t in dtypes for n in (100, 4096)):
        out, repair = torch.empty(1, tokens, 64, dim, dtype=dtype), maps(64, dim)
        tiles = choose_tiles(dim, dtype, tokens, 64)
        kernel = launch(out, repair, 0, tokens, tiles, warmup=True)
        tell(kernel, f"{dim}-{tiles.count}-{str(dtype)[6:]}", capability)


def compile_rows(capability: int, slow: bool) -> None:
    from diffsparse.kernels.rows import host, plain

    dims = (16, 64, 72, 128, 160, 256) if slow else (128,)
    for dim, dtype in ((d, t) for d in dims for t in (torch.bfloat16, torch.float16)):
        q, k, v = (torch.empty(1, 4096, 4, dim, dtype=dtype) for _ in range(3))
        rows, mask = torch.arange(200), torch.ones(1, 4096, dtype=torch.bool)
        length = torch.full((32,), 128)
        some = torch.empty(4, 200, dim, dtype=dtype)
        parts = torch.empty(3, 4, 32, dim)
        known = plain.Summaries(parts, parts, parts[0])
        kernels = host.launch_attend(q, k, v, rows, 1.0, mask, warmup=True)
        keys, values = (x.view(4, 32, 128, dim) for x in (k, v))
        out, lse, weights = torch.empty(4, 200, dim), torch.empty(4, 200), torch.empty(4, 4, 32, 200)
        kernels += [host.launch_errors(some, keys, values, length, out, lse, known, weights, 1.0, warmup=True)]
        for kernel in kernels:
            tell(kernel, f"{dim}-{str(dtype)[6:]}", capability)


def compile_select(capability: int, slow: bool) -> None:
    from diffsparse.kernels.select import host

    for dim in (16, 64, 72, 128, 160, 256) if slow else (128,):
        x = torch.empty(1, 2560, 4, dim, dtype=torch.bfloat16)
        tokens = random_layout(TokenGrid(2, 32, 40), [head()] * 4, 128, 0.5).tokens
        for parts, unit, bounds in ((1, False, False), (1, False, True), (1, True, False), (4, False, False)):
            kernel = host.launch_parts(x, tokens, parts, unit, bounds, warmup=True)
            tell(kernel, f"{dim}-{parts}-{unit}-{bounds}", capability)
        means, counts = torch.empty(1, 4, 600, 4, dim), torch.empty(4, 600, 4, dtype=torch.int64)
        tell(host.launch_parts_score(means, means, counts, counts, 1.0, warmup=True), str(dim), capability)
        q, keys, counts = torch.empty(1, 4, 600, dim), torch.empty(1, 4, 600, 16, dim), torch.empty(1, 600, 16).long()
        for dtype in (torch.bfloat16, torch.float32) if dim <= 128 else (torch.bfloat16,):
            for kernel in host.launch_excess(q, keys.to(dtype), counts, torch.empty(1, 4, 600, 16, 16), warmup=True):
                tell(kernel, f"{dim}-{str(dtype)[6:]}", capability)
    for n in (70, 600, 1860):
        scores, least = torch.empty(1, 4, n, n), torch.empty(1, 4, 15, dtype=torch.int32)
        candidates, wanted = torch.empty(1, 4, n, n, dtype=torch.bool), torch.empty(1, 4, n, dtype=torch.int32)
        kernels = [
            host.launch_best(scores, candidates, wanted, warmup=True),
            host.launch_prefix(scores, candidates, scores, 0.9, warmup=True),
            host.launch_reach(scores, least, warmup=True),
        ]
        for kernel in kernels:
            tell(kernel, str(n), capability)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int, choices=SHARED)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--gluon", action="store_true", help="the Hopper kernel")
    parser.add_argument("--repair", action="store_true", help="the kernel of the repair")
    parser.add_argument("--rows", action="store_true", help="the kernels for a few queries")
    parser.add_argument("--select", action="store_true", help="the kernels of rules and budgets")
    arguments = parser.parse_args()
    capability = arguments.capability
    from triton.runtime import driver

    driver.set_active(AbsentGpu(capability))
    if arguments.gluon:
        return compile_gluon(arguments.slow)
    if arguments.rows:
        return compile_rows(capability, arguments.slow)
    if arguments.select:
        return compile_select(capability, arguments.slow)
    if arguments.repair:
        return compile_repair(capability, arguments.slow)
    # With text there are short blocks.
    short, full = TokenGrid(2, 16, 16, text_after=70), TokenGrid(2, 16, 16)
    cases = [(128, 128, torch.bfloat16, "none")]
    if arguments.slow:
        cases += [(d, b, torch.bfloat16, "moments") for d in (32, 64, 72, 128, 256) for b in (64, 128)]
        cases += [(128, 64, torch.float16, "mean"), (64, 64, torch.float32, "moments")]
        cases += [(d, b, torch.bfloat16, "centroids") for d in (64, 128, 256) for b in (64, 128)]
    for grid, (dim, block, dtype, tail) in [(full, cases[0]), *((short, case) for case in cases)]:
        entries = [head(tail=tail), head(TileOrder(1, 8, 8))] if arguments.slow else [head(tail=tail)]
        layout = random_layout(grid, entries, block, 0.5)
        q, k, v = inputs(grid, len(entries), dim, dtype=dtype)
        call = make_call(q, k, v, layout, return_lse=True)
        about = (block, dim, dtype, tail != "none", divmod(capability, 10), SHARED[capability], some_partial(call))
        kernels = launch(call, choose_config(*about), choose_config(*about, gathered=True), warmup=True)
        if tail != "none":
            kernels += summaries(call, warmup=True)
        for kernel in kernels:
            text = kernel.asm["ptx"]
            found: dict[str, Any] = {
                "kernel": kernel.metadata.name,
                "case": f"{dim}-{block}-{str(dtype)[6:]}-{tail}",
                "shared": kernel.metadata.shared,
                "allowed": SHARED[capability],
                "wgmma": text.count("wgmma.mma_async"),
                "mma": text.count("mma.sync"),
                "tcgen05": text.count("tcgen05.mma"),
                "bulk": text.count("cp.async.bulk.tensor"),
            }
            if capability == 90 and not arguments.slow:
                found |= assembled(text)
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
