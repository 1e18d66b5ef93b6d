"""Time the kernels against dense attention: ``python benchmarks/kernels.py --device cuda --json out.json``.

Every backend first passes a correctness gate. Times are medians; density counts kept blocks.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
from pathlib import Path

import torch

from diffsparse.grid import TokenGrid
from diffsparse.kernels.bench import bench


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--grid", default="32,32,32" if cuda else "5,32,32", help="latent tokens T,H,W")
    parser.add_argument("--heads", type=int, default=24 if cuda else 4)
    parser.add_argument("--head-dim", type=int, default=128 if cuda else 64)
    parser.add_argument("--block-size", type=int, default=128 if cuda else 64, choices=(64, 128))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--densities", default="0.1,0.25,0.3,0.5,0.7,1.0")
    parser.add_argument("--tails", default="none,moments")
    parser.add_argument("--backends", default="triton,cpu")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    a = parser.parse_args()
    rows = bench(
        TokenGrid.parse(a.grid),
        heads=a.heads,
        head_dim=a.head_dim,
        densities=[float(d) for d in a.densities.split(",")],
        block_size=a.block_size,
        tails=a.tails.split(","),
        backends=a.backends.split(","),
        device=a.device,
        dtype=getattr(torch, a.dtype),
        batch=a.batch,
    )
    device = (
        torch.cuda.get_device_name()
        if a.device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"{device}, torch {torch.__version__}, {a.grid} tokens, {a.heads} heads of {a.head_dim}, {a.dtype}")
    for r in rows:
        print(
            f"{r['name']:<26}{r['tail']:<9}density {r['density']:.3f}  {r['ms']:9.3f} ms  "
            f"{r['tflops']:8.2f} TF/s  {r['speedup']:6.2f}x"
        )
    if a.json:
        a.json.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    if a.csv:
        with a.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
