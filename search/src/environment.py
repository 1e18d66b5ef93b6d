"""The machine and the versions that figures were made with."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["PACKAGES", "environment", "full_environment", "stamp", "versions"]

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "scipy",
    "torchmetrics",
    "lpips",
    "xformers",
    "matplotlib",
    "imageio-ffmpeg",
)


def versions() -> dict[str, str | None]:
    """Installed version of every package that plays a part; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(device: Any) -> dict[str, Any]:
    """A few lines to stand beside a figure: device, threads, versions."""
    import torch

    import diffsparse

    device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}: {_processor()}",
        "threads": torch.get_num_threads(),
        "diffsparse": diffsparse.__version__,
        "torch": torch.__version__,
        "diffusers": versions()["diffusers"],
        "python": platform.python_version(),
    }


def full_environment() -> dict[str, Any]:
    """What `diffsparse env` prints: everything that a bug report needs."""
    import torch

    import diffsparse
    from diffsparse.kernels import available_backends, backend_ways

    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return {
        "diffsparse": diffsparse.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "gpus": gpus,
        "packages": versions(),
        "backends": available_backends(),
        "backend_ways": backend_ways(),
    }


def stamp(device: Any) -> dict[str, str]:
    """What stands beside every figure of a committed benchmark: device, versions, date (UTC)."""
    import torch

    import diffsparse

    device = torch.device(device)
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device)
        if on_gpu
        else f"none ({_processor()}, {torch.get_num_threads()} threads)",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "diffsparse": diffsparse.__version__,
        "torch": torch.__version__,
        "triton": versions()["triton"] or "",
        "cuda": str(torch.version.cuda or ""),
        "cudnn": str(torch.backends.cudnn.version() or "") if on_gpu else "",
    }
