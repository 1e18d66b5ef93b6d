"""As much of Gluon as the Hopper kernel uses, emulated on the CPU, so that its logic can be tested without a GPU.

The parts of a program run as threads. What is asynchronous on the GPU happens as late as it may: a product is taken
when it is waited for, and reads shared memory only then; a copy lands some time after it was issued. So a slot that is
given back too early, or read too soon, gives wrong numbers (shared memory starts as NaN), and a lost signal a deadlock,
which is reported. Layouts of registers mean nothing here, and speed is not shown.
"""

from __future__ import annotations

import random
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_emulated"]

#: How long a signal may take.
DEADLOCK_SECONDS = 20.0
_local = threading.local()


class Deadlock(AssertionError):
    """A signal that never came."""


@dataclass
class Pointer:
    """An address in a tensor's memory, in elements."""

    memory: torch.Tensor
    offset: Any = 0

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + other)


class Barrier:
    """An mbarrier: a phase ends once all arrivals and all bytes have come in. One from ``init`` to ``invalidate``."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0
        self.valid = False
        self.changed = threading.Condition()

    def _settle(self) -> None:
        assert self.valid, "a signal to what is no barrier"
        assert self.pending >= 0, "more arrivals than the barrier counts"
        if self.pending == 0 and self.bytes == 0:
            self.pending = self.count
            self.phase += 1
            self.changed.notify_all()

    def init(self, count: int) -> None:
        assert not self.valid, "a barrier was initialised twice"
        self.count = self.pending = count
        self.valid = True

    def invalidate(self) -> None:
        assert self.valid and self.bytes == 0, "a barrier was given up before its bytes had come in"
        self.valid = False

    def arrive(self, count: int) -> None:
        with self.changed:
            self.pending -= count
            self._settle()

    def expect(self, count: int) -> None:
        with self.changed:
            self.bytes += count
            self.pending -= 1
            self._settle()

    def deliver(self, count: int) -> None:
        with self.changed:
            self.bytes -= count
            self._settle()

    def wait(self, parity: int) -> None:
        with self.changed:
            assert self.valid, "waited for what is no barrier"
            if not self.changed.wait_for(lambda: self.phase % 2 != parity, DEADLOCK_SECONDS):
                raise Deadlock("waited in vain for a barrier")


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, value: Any, layout: Any = None) -> None:
        self.value = value
        self.type = types.SimpleNamespace(layout=layout)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.value.shape)

    def index(self, i: Any) -> Shared:
        return Shared(self.value[int(i)], self.type.layout)

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.value.view(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.value.permute(order))

    def load(self, layout: Any) -> torch.Tensor:
        return self.value.clone()

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        return Shared(self.value.view(dtype).view(shape))


@dataclass
class Descriptor:
    """A tensor ``[B, H, S, D]`` that is fetched in boxes; zeros beyond its borders."""

    base: torch.Tensor
    box: list[int]

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    layout = None


@dataclass
class Product:
    """A product under way. Its operands are read when it is waited for."""

    take: Callable[[], torch.Tensor]
    value: torch.Tensor | None = None


def _operand(x: Any) -> torch.Tensor:
    return (x.value if isinstance(x, Shared) else x).float()


def _summand(acc: Any, use_acc: bool) -> Any:
    if not use_acc:
        return 0.0
    return acc.value if isinstance(acc, Product) else acc


def warpgroup_mma(a: Any, b: Shared, acc: torch.Tensor, *, use_acc: bool = True, is_async: bool = False) -> Any:
    # Products follow one another, so that one may add to the result of another that is under way.
    assert not isinstance(acc, Product) or acc in _local.under_way, "a product was added to without being waited for"
    product = Product(lambda: _operand(a) @ _operand(b) + _summand(acc, use_acc))
    _local.under_way.append(product)
    return product if is_async else warpgroup_mma_wait(0, deps=(product,))


def warpgroup_mma_wait(num_outstanding: int = 0, deps: tuple[Any, ...] = ()) -> Any:
    if len(_local.under_way) > num_outstanding:
        time.sleep(random.random() * 1e-3)  # others go on meanwhile
    while len(_local.under_way) > num_outstanding:
        product = _local.under_way.pop(0)
        product.value = product.take()
    out = tuple(x.value if isinstance(x, Product) and x.value is not None else x for x in deps)
    return out[0] if len(out) == 1 else out


def copy_tile(desc: Descriptor, where: list[Any], bar: Shared, to: Shared) -> None:
    at = [int(x) for x in where]
    assert list(to.value.shape) == desc.box
    rows, columns = (slice(a, a + n) for a, n in zip(at[2:], desc.box[2:]))
    source = desc.base[at[0] : at[0] + 1, at[1] : at[1] + 1, rows, columns]

    def land() -> None:
        time.sleep(8e-3 if random.random() < 0.1 else random.random() * 2e-4)  # now and then a copy takes long
        to.value.zero_()
        to.value[:, :, : source.shape[2], : source.shape[3]] = source
        bar.value[0].deliver(to.value.numel() * to.value.element_size())

    threading.Thread(target=land).start()


class _Mbarrier:
    MBarrierLayout = staticmethod(lambda: None)

    @staticmethod
    def init(bar: Shared, count: int) -> None:
        bar.value[0].init(int(count))

    @staticmethod
    def invalidate(bar: Shared) -> None:
        bar.value[0].invalidate()

    @staticmethod
    def wait(bar: Shared, phase: Any, pred: Any = True) -> None:
        if bool(pred):
            bar.value[0].wait(int(phase))

    @staticmethod
    def expect(bar: Shared, count: int) -> None:
        bar.value[0].expect(int(count))

    @staticmethod
    def arrive(bar: Shared, *, count: int = 1) -> None:
        bar.value[0].arrive(int(count))


def _load(p: Pointer, mask: Any = None, other: Any = 0) -> torch.Tensor:
    offset = torch.as_tensor(p.offset)
    if mask is None:
        assert int(offset.min()) >= 0 and int(offset.max()) < p.memory.numel(), "a load outside of the tensor"
        return p.memory[offset]
    assert bool(((offset >= 0) & (offset < p.memory.numel()) | ~mask).all()), "a load outside of the tensor"
    return torch.where(mask, p.memory[torch.where(mask, offset, 0)], other)


def _store(p: Pointer, value: torch.Tensor, mask: Any = True) -> None:
    value, mask = torch.as_tensor(value), torch.as_tensor(mask)
    offset, mask = torch.broadcast_tensors(torch.as_tensor(p.offset), mask)
    assert bool(((offset >= 0) & (offset < p.memory.numel()) | ~mask).all()), "a store outside of the tensor"
    p.memory[offset[mask]] = value.expand(mask.shape)[mask].to(p.memory.dtype)


_ATOMIC = threading.Lock()


def _atomic(change: Callable[[torch.Tensor, Any], Any]) -> Callable[[Pointer, Any], torch.Tensor]:
    def run(p: Pointer, value: Any) -> torch.Tensor:
        at = int(p.offset)
        with _ATOMIC:
            before = p.memory[at].clone()
            p.memory[at] = change(before, value)
        return before

    return run


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
    if dtype == torch.int64:
        made = [Barrier() for _ in range(shape[0])]
        _local.barriers += made
        return Shared(made if len(shape) == 1 else [[barrier] for barrier in made])
    return Shared(torch.full(shape, 77 if dtype == torch.int8 else float("nan")).to(dtype), layout)


def _warp_specialize(parts: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: Any, registers: Any) -> None:
    assert len(parts) == len(warps) + 1 == len(registers) + 1
    errors: list[BaseException] = []
    program = (_local.program, _local.programs)

    def run(part: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        _local.program, _local.programs = program
        _local.under_way = []
        try:
            part(*arguments)
            assert not _local.under_way, "a product was never waited for"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLOCK_SECONDS)
    if errors:
        raise errors[0]


def _tensor_range(*arguments: Any) -> Iterable[Any]:
    """``range`` whose values are, in a kernel, scalars of the device."""
    if getattr(_local, "program", None) is None:
        return range(*arguments)
    return (torch.tensor(i) for i in range(*(int(x) for x in arguments)))


class Kernel:
    """A compiled function: called by other ones, or launched over a grid."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            # Tensors go in as addresses; what is written is seen through them.
            given = [Pointer(x.view(-1)) if isinstance(x, torch.Tensor) else x for x in arguments]
            for program in range(grid[0]):
                _local.program, _local.programs, _local.barriers = program, grid[0], []
                self.function(*given, **constants)
                # Else the compiler takes the barrier for dead where it is no longer used, and puts values in its place.
                assert not any(barrier.valid for barrier in _local.barriers), "a barrier was never invalidated"
            _local.program = None

        return launch


def _language() -> types.ModuleType:
    gl = types.ModuleType("emulated_gluon")
    gl.constexpr = lambda value: value  # type: ignore[attr-defined]
    gl.float8e4nv = torch.float8_e4m3fn  # type: ignore[attr-defined]
    for name in ("int8", "int32", "int64", "float32", "bfloat16", "float16"):
        setattr(gl, name, getattr(torch, name))
    layout = lambda *a, **k: None  # noqa: E731
    functions: dict[str, Any] = dict(
        program_id=lambda axis: torch.tensor(_local.program),
        num_programs=lambda axis: _local.programs,
        load=_load,
        store=_store,
        where=lambda c, a, b: torch.where(torch.as_tensor(c), a, b),
        maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
        max=lambda x, axis: x.amax(axis),
        min=lambda x, axis: x.amin(axis),
        sum=lambda x, axis: x.sum(axis),
        atomic_add=_atomic(lambda before, value: before + value),
        atomic_xchg=_atomic(lambda before, value: value),
        exp2=torch.exp2,
        log2=torch.log2,
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        arange=lambda a, b, layout: torch.arange(a, b),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
        static_range=range,
        split=lambda x: x.unbind(-1),
        allocate_shared_memory=_allocate,
        warp_specialize=_warp_specialize,
        SliceLayout=layout,
        NVMMADistributedLayout=layout,
        DotOperandLayout=layout,
        DistributedLinearLayout=layout,
        BlockedLayout=layout,
    )
    for name, function in functions.items():
        setattr(gl, name, function)
    return gl


def _four_fp8(*bits: torch.Tensor) -> torch.Tensor:
    # NaN has the bits 127.
    whole = torch.stack(bits, -1).relu().half().round().nan_to_num(127.0)
    return whole.to(torch.uint8).view(torch.float8_e4m3fn)


_PACKAGE = "diffsparse.kernels.backends.gluon_sm90"
#: The kernel's modules, in the order in which they import one another, and what of each looks into bits or is assembly.
_MODULES: dict[str, dict[str, Any]] = {
    "parts": {},
    "eight": {
        "_as_float": lambda x: x.float() + 12582912.0,
        "_four_fp8": _four_fp8,
        "ones": lambda block: Shared(torch.ones(8, block).to(torch.float8_e4m3fn)),
        "_unpacked": lambda x: x.reshape(64, -1),
    },
    "device": {
        "_cut": lambda p: (p.view(torch.int32) & -65536).view(torch.float32),
        "_pairs": lambda p, dtype: p.to(dtype),
        "_operand": lambda p, dtype, layout: p,
    },
    "host": {},
}


def _numbers(module: types.ModuleType) -> types.ModuleType:
    """A module of constants for Triton, as plain numbers."""
    plain = types.ModuleType("emulated_numbers")
    for name in module.__all__:
        setattr(plain, name, getattr(module, name).value)
    return plain


def load_emulated(multiprocessors: int, edit: tuple[str, str] | None = None) -> types.ModuleType:
    """The module that launches the Hopper kernel, with Gluon put in by emulation, on a GPU of so many multiprocessors.

    ``edit``: a piece of its text and what to put there, to see whether a fault is noticed.
    """
    from diffsparse.kernels.backends.triton import codes

    gl = _language()
    gluon = types.ModuleType("emulated")
    gluon.jit = Kernel  # type: ignore[attr-defined]
    gluon.constexpr_function = lambda function: function  # type: ignore[attr-defined]
    gluon.language = gl  # type: ignore[attr-defined]
    hopper = types.ModuleType("emulated_hopper")
    for name, value in dict(
        fence_async_shared=lambda: None,
        mbarrier=_Mbarrier,
        warpgroup_mma=warpgroup_mma,
        warpgroup_mma_wait=warpgroup_mma_wait,
    ).items():
        setattr(hopper, name, value)
    compat = types.ModuleType("emulated_compat")
    compat.copy_tile = copy_tile  # type: ignore[attr-defined]
    compat.tensor_descriptor = lambda x, shape, strides, box: Descriptor(x, box)  # type: ignore[attr-defined]
    experimental = types.ModuleType("emulated_experimental")
    experimental.gluon = gluon  # type: ignore[attr-defined]
    modules = {f"{_PACKAGE}.{name}": types.ModuleType(f"emulated_{name}") for name in _MODULES}
    stand_ins = {
        "triton.experimental": experimental,
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language": gl,
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
        f"{_PACKAGE}.compat": compat,
        codes.__name__: _numbers(codes),
        **modules,
    }
    folder = Path(__file__).resolve().parents[2] / "kernels" / "src" / "backends" / "gluon_sm90"
    sources = {name: (folder / f"{name}.py").read_text("utf-8") for name in _MODULES}
    if edit is not None:
        count = sum(source.count(edit[0]) for source in sources.values())
        assert count == 1, f"the kernel has {count} times {edit[0]!r}"
        sources = {name: source.replace(*edit) for name, source in sources.items()}
    before = {name: sys.modules.get(name) for name in stand_ins}
    for module in modules.values():
        sys.modules[module.__name__] = module
    sys.modules.update(stand_ins)
    try:
        for (name, own), module in zip(_MODULES.items(), modules.values()):
            exec(compile(sources[name], str(folder / f"{name}.py"), "exec"), module.__dict__)
            module.__dict__.update(own, range=_tensor_range)
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
    module._multiprocessors = lambda device: multiprocessors  # type: ignore[attr-defined]
    module.TWO_PASSES = 0  # type: ignore[attr-defined]  # however small a call is
    return module
