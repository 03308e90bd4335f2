"""Launches of Triton kernels on CPU tensors, caught and run by the machine.

Inside `on_machine(arch)` every kernel[grid](…) binds and specialises its arguments with Triton's own binder, is
compiled by Triton for that architecture as far as PTX, and executed. Inside `smca_on_machine(arch)` the backend
"triton" of smca_kernels takes CPU tensors besides, and configures itself as on that GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from smca_kernels.backends.triton import hopper
from smca_kernels.testing.machine.arithmetic import Array
from smca_kernels.testing.machine.codegen import Program
from smca_kernels.testing.machine.execution import run_launch
from smca_kernels.testing.machine.memory import Faults, Region

MULTIPROCESSORS = {80: 108, 86: 72, 89: 58, 90: 132}  # of an A100, an A10, an L4 and an H100
ORDERS: dict[str, Callable[[int, int], Array]] = {  # of a launch's CTAs: (count, seed) → their numbers
    "forward": lambda count, seed: np.arange(count),
    "reversed": lambda count, seed: np.arange(count)[::-1],
    "shuffled": lambda count, seed: np.random.default_rng(seed).permutation(count),
}
SCRATCH = 2  # pointers that Triton adds to the parameters
SCALARS = {"i1": 32, "i8": 32, "i16": 32, "i32": 32, "u32": 32, "i64": 64, "u64": 64}  # Triton's type → bits

MAX_KEPT = 64  # kernels; each takes tens of megabytes, and a hunt sees hundreds
_programs: dict[str, Program] = {}  # by PTX
_compiled: dict[tuple[Any, ...], tuple[dict[str, str], Any]] = {}  # signature and kernel


@dataclass
class Session:
    """How launches are run, and what was found.

    Attributes:
        arch: compute capability, 80 for sm_80.
        order: of a launch's CTAs, a key of ORDERS.
        at_once: CTAs that run together.
        seed: of "shuffled".
        edit: changes the PTX before it is run, to plant a fault or to try a repair.
        faults: what the checks found.
        launches: name and grid of each kernel, in order.
        ptx: the text of each kernel that was launched, by name.
        seconds: spent executing, translation and compilation apart.
    """

    arch: int
    order: str = "forward"
    at_once: int = 4
    seed: int = 0
    edit: Callable[[str], str] | None = None
    faults: Faults = field(default_factory=Faults)
    launches: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    ptx: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    _written: dict[int, Array] = field(default_factory=dict)  # address of a fresh storage → bytes written
    _kept: list[Any] = field(default_factory=list)  # fresh storages, so that no address is used twice

    def unwritten(self, tensor: Tensor) -> int:
        """Bytes of a tensor's storage that torch.empty left and no kernel wrote."""
        written = self._written.get(tensor.untyped_storage().data_ptr())
        return 0 if written is None else int((~written).sum())

    def watch(self, tensor: Tensor) -> Tensor:
        """Fill a fresh tensor with NaN (integers: with -1) and count its bytes as not initialised."""
        if tensor.device.type == "cpu" and tensor.numel():
            storage = tensor.untyped_storage()
            self._written[storage.data_ptr()] = np.zeros(storage.nbytes(), bool)
            self._kept.append(storage)
            _bytes(storage)[:] = 0xFF
        return tensor

    def launch(self, function: JITFunction, args: tuple[Any, ...], grid: Any, options: dict[str, Any]) -> None:
        """Compile a kernel for these arguments and run it."""
        bound, signature, compiled = _compile(function, self.arch, args, options)
        text = compiled.asm["ptx"]
        if self.edit is not None:
            text = self.edit(text)
        if text not in _programs:
            _make_room(_programs)
            _programs[text] = Program(text)
        program = _programs[text]
        name, threads = program.kernel.name, 32 * compiled.metadata.num_warps
        arguments = {key: value for key, value in bound.items() if signature[key] != "constexpr"}
        regions: list[Region] = []
        values = [self._value(key, value, signature[key], regions) for key, value in arguments.items()]
        parameters = [parameter for parameter, _ in program.kernel.params]
        if len(parameters) != len(values) + SCRATCH or threads != program.kernel.threads:
            raise RuntimeError(f"{name}: parameters or threads are not those of the launch")
        if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
            raise NotImplementedError(f"{name}: scratch memory")
        columns, rows, planes = (int(size) for size in (*(grid(bound) if callable(grid) else grid), 1, 1)[:3])
        order = ORDERS[self.order](columns * rows * planes, self.seed)
        start = time.perf_counter()
        run_launch(
            program, regions, dict(zip(parameters, values + [0] * SCRATCH, strict=True)), (columns, rows, planes),
            threads, compiled.metadata.shared, self.faults, order, self.at_once,
        )  # fmt: skip
        self.seconds += time.perf_counter() - start
        self.launches.append((name, (columns, rows, planes)))
        self.ptx[name] = text
        for region in regions:
            if region.initialised is not None:
                written = np.repeat(region.initialised, region.granule)[: region.size]
                self._written[region.storage.ctypes.data][:] = written

    def _value(self, name: str, value: Any, type_: str, regions: list[Region]) -> int:
        """The bits of a parameter; a tensor becomes a region."""
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() % 16:
                raise NotImplementedError("a storage that is not aligned to 16 bytes")
            granule = min(value.element_size(), 4)
            initialised: Any = self._written.get(storage.data_ptr())
            if initialised is not None:
                initialised = initialised[: initialised.size // granule * granule].reshape(-1, granule).all(1)
            start, data = int(value.storage_offset()) * value.element_size(), _bytes(storage)
            allowed = _elements(value, granule, data.size)
            regions.append(Region(len(regions) + 1, name, data, start, granule, allowed, initialised))
            return regions[-1].address
        if type_ == "fp32":
            return int(np.float32(value).view(np.uint32))
        if type_ not in SCALARS:
            raise NotImplementedError(f"argument {name} of type {type_}")
        return int(value) & ((1 << SCALARS[type_]) - 1)


def _make_room(kept: dict[Any, Any]) -> None:
    """Forget the kernel that was kept first, where there are as many as may be."""
    if len(kept) >= MAX_KEPT:
        del kept[next(iter(kept))]


def _bytes(storage: Any) -> Array:
    return torch.tensor([], dtype=torch.uint8).set_(storage).numpy()


def _elements(tensor: Tensor, granule: int, size: int) -> Array | None:
    """Which granules of a storage of `size` bytes are elements of a tensor; None: all."""
    if tensor.is_contiguous() and tensor.numel() * tensor.element_size() == size:
        return None
    flags = torch.zeros(size // tensor.element_size(), dtype=torch.bool)
    if tensor.numel():
        flags.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return np.repeat(flags.numpy(), tensor.element_size() // granule)


def _compile(
    function: JITFunction, arch: int, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str], Any]:
    """Arguments by name, their types, and the kernel, compiled as a launch on a GPU would."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = {"debug": False, **options}
    binder = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, parsed = binder(*args, **options)
    key = function, arch, str(specialization), str(sorted(parsed.items(), key=str))
    if key not in _compiled:
        _make_room(_compiled)
        parsed, signature, constexprs, attrs = function._pack_args(backend, options, bound, specialization, parsed)
        source = ASTSource(function, signature, constexprs, attrs)
        with _without_assembler(), hopper.compiler_for(arch):
            _compiled[key] = signature, triton.compile(source, target=target, options=parsed.__dict__)
    return bound, *_compiled[key]


@contextmanager
def _without_assembler() -> Iterator[None]:
    """Compile without ptxas, which takes most of the time, in a cache apart: what is in it can't run on a GPU."""

    def make_cubin(self: Any, source: Any, metadata: Any, options: Any, capability: Any) -> bytes:
        return b"not assembled"

    with mock.patch.object(CUDABackend, "make_cubin", make_cubin), knobs.cache.scope():
        knobs.cache.dir = str(Path(knobs.cache.dir) / "not-assembled")
        yield


@contextmanager
def on_machine(arch: int, **options: Any) -> Iterator[Session]:
    """Run every launch of a Triton kernel on the machine; fresh tensors are poisoned and count as not initialised.

    Args:
        arch: compute capability, 80 for sm_80.
        options: order, at_once, seed and edit of `Session`.

    Raises:
        RuntimeError: Triton was imported to interpret.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted: unset TRITON_INTERPRET before triton is imported")
    session = Session(arch, **options)

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        session.launch(self, args, grid, kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, _watched(session, getattr(owner, name))))
        yield session


def _watched(session: Session, make: Callable[..., Any]) -> Callable[..., Any]:
    def make_watched(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        return session.watch(made) if isinstance(made, Tensor) else made

    return make_watched


@contextmanager
def smca_on_machine(arch: int, multiprocessors: int | None = None, **options: Any) -> Iterator[Session]:
    """Run backend="triton" of smca_kernels on CPU tensors as on a GPU; arguments besides as `on_machine`.

    Args:
        multiprocessors: by which the work is shared out; None: the architecture's, 0: never split.
    """
    from smca_kernels.backends.triton import configurations, launch, operator, prior

    count = MULTIPROCESSORS[arch] if multiprocessors is None else multiprocessors
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(configurations, "architecture", return_value=arch))
        stack.enter_context(mock.patch.object(launch, "multiprocessors", return_value=count))
        for module in (operator, prior):  # what may be interpreted on a CPU may be executed there
            stack.enter_context(mock.patch.object(module, "INTERPRETED", True))
        yield stack.enter_context(on_machine(arch, **options))


def run_kernel(kernel: Any, arch: int, args: tuple[Any, ...], grid: tuple[int, ...], **options: Any) -> Session:
    """Run one launch, which changes the tensors among `args` in place.

    Args:
        options: order, at_once, seed and edit of `Session`; all others are those of the launch.
    """
    own = {name: options.pop(name) for name in ("order", "at_once", "seed", "edit") if name in options}
    with on_machine(arch, **own) as session:
        kernel[grid](*args, **options)
    return session
