"""Simulate accelerators on a machine that has none: tensors on ``simgpu:0`` and ``simgpu:1`` that hold the CPU's memory.

It refuses what a GPU refuses: to mix devices in one operation, to hand a tensor to NumPy, to draw for the device from a
generator of the CPU. It counts what a GPU makes the host wait for: reading a value, finding the rows of a mask, copying
between the devices. A copy to the host that nobody waits for holds garbage until an event recorded after it is waited for.

    with simulated() as device:
        attack(model.to(DEVICE))(images.to(DEVICE), labels.to(DEVICE))
        device.waits, device.places

It stands on hooks of PyTorch that are experimental: `AVAILABLE` says whether they are there.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

NAME = "simgpu"
GARBAGE = -77
SETUP = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
AVAILABLE = SETUP is not None
DEVICE = SECOND = torch.device("cpu")


class Backend:
    """What PyTorch asks of a device's module. It is there within `simulated` alone: others look for any accelerator."""

    there = False

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return self.there

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 2 if self.there else 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass  # it draws from the CPU's generator, which has a state of its own

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device="cpu")

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


KEY: Any = getattr(torch._C.DispatchKey, "AutocastPrivateUse1", None)


def in_bfloat16(operation: Any, *args: Any) -> Any:
    """Run an operation as autocast does."""
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(KEY)):
        return operation(*(a.to(torch.bfloat16) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))


BACKEND = Backend()
if SETUP is not None:
    SETUP(rename=NAME, backend_module=BACKEND)
    DEVICE, SECOND = (torch.device(NAME, index) for index in range(2))
    LIBRARIES = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    LIBRARIES[0].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for operation in (torch.ops.aten.linear, torch.ops.aten.conv2d, torch.ops.aten.matmul):
        LIBRARIES[1].impl(operation.default, partial(in_bfloat16, operation.default), "AutocastPrivateUse1")

COPY = "aten::_to_copy"
WRITES = {"aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
INDEXES = {"aten::index", "aten::index.Tensor", *WRITES}
MIXES = {COPY, "aten::copy_", *INDEXES}  # which take tensors of the CPU beside those of the device
READS = {  # which end in a value or a shape that the host must know
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::bincount",
    "aten::repeat_interleave",
}


class Held(Tensor):
    """A tensor of the device, which holds one of the CPU."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor, device: torch.device = DEVICE) -> Held:
        held = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=device,
        )
        held.elem = elem
        return held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return run(func, args, kwargs or {}, None)

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["elem"], self.device

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> Held:
        return Held(inner["elem"], meta)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"Held({self.elem!r})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy


class Waits:
    """A count of the host's waits.

    Attributes:
        waits: how often the host waited.
        places: how often at each place, by file, line and operation.
        copies: what the host reads too early of copies that nobody has waited for, and what they will hold.
    """

    def __init__(self) -> None:
        self.waits = 0
        self.places: Counter[tuple[str, int, str]] = Counter()
        self.copies: list[tuple[Tensor, Tensor]] = []

    def wait(self, operation: str) -> None:
        self.arrive(self.copies)
        self.waits += 1
        frame: Any = sys._getframe()
        while frame and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        if frame:
            self.places[frame.f_code.co_filename.rsplit("/", 1)[-1], frame.f_lineno, operation] += 1

    def leave(self, value: Tensor) -> Tensor:
        """Return the host's copy of a value, which has not arrived."""
        copy = torch.full_like(value, GARBAGE if value.dtype != torch.bool else True)
        self.copies.append((copy, value))
        return copy

    def arrive(self, copies: list[tuple[Tensor, Tensor]]) -> None:
        for copy, value in copies:
            copy.copy_(value)
        self.copies = [held for held in self.copies if all(held[0] is not copy for copy, _ in copies)]


def is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def check(name: str, args: Any, kwargs: dict[str, Any], held: list[Held], plain: list[Tensor], on_device: bool) -> None:
    """Raise what a GPU raises."""
    if held and name not in MIXES and any(tensor.dim() > 0 for tensor in plain):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two, {DEVICE} and cpu! ({name})"
        )
    if name not in (COPY, "aten::copy_") and len({tensor.device for tensor in held}) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {DEVICE} and {SECOND}! ({name})")
    if name in INDEXES and held and not on_device:
        raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor (cpu) ({name})")
    if name in WRITES and args[2].dim() > 0 and isinstance(args[2], Held) != on_device:
        raise RuntimeError(f"Expected all tensors to be on the same device ({name}: values)")
    generator = kwargs.get("generator")
    if on_device and generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"Expected a {NAME!r} device type for generator but found 'cpu' ({name})")


def waits_for(name: str, args: Any, kwargs: dict[str, Any], held: list[Held], on_device: bool) -> bool:
    """Tell whether the host waits for an operation."""
    if name == COPY:
        moved = kwargs.get("device") is not None and isinstance(args[0], Held) != on_device
        return moved and not kwargs.get("non_blocking")
    if name == "aten::copy_":
        return isinstance(args[0], Held) != isinstance(args[1], Held) and args[1].dim() > 0 and not (args[2:] or (False,))[0]
    if name in INDEXES and held:
        indices = [index for index in args[1] if index is not None]
        return any(is_mask(index) or (on_device and not isinstance(index, Held)) for index in indices)
    return name in READS and bool(held)


def each(change: Callable[[Any], Any], values: Any) -> Any:
    """Return nested lists, tuples and dictionaries with every value changed."""
    if isinstance(values, (list, tuple)):
        return type(values)([each(change, value) for value in values])
    if isinstance(values, dict):
        return {key: each(change, value) for key, value in values.items()}
    return change(values)


def below(value: Any) -> Any:
    """Return what the CPU is told instead."""
    if isinstance(value, Held):
        return value.elem
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def run(func: Any, args: Any, kwargs: dict[str, Any], waits: Waits | None) -> Any:
    """Run one operation on the memory of the CPU, and return tensors of the device where they belong there."""
    name = func._schema.name
    held: list[Held] = []
    plain: list[Tensor] = []

    def sort(value: Any) -> None:
        if isinstance(value, Tensor):
            (held if isinstance(value, Held) else plain).append(value)  # type: ignore[arg-type]

    each(sort, (args, kwargs))
    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    on_device = bool(held) if wanted is None else wanted.type == NAME
    if name in INDEXES or name == "aten::copy_":
        on_device = isinstance(args[0], Held)
    if not held and not on_device:
        return func(*args, **kwargs)
    check(name, args, kwargs, held, plain, on_device)
    if waits is not None and waits_for(name, args, kwargs, held, on_device):
        waits.wait(name.removeprefix("aten::"))

    taken_args, taken = each(below, args), each(below, kwargs)
    if wanted is not None:
        taken["device"] = torch.device("cpu")
    if on_device:
        taken.pop("pin_memory", None)
    out = func(*taken_args, **taken)
    if name == COPY and out is taken_args[0]:
        out = out.clone()
    if name == COPY and not on_device and kwargs.get("non_blocking") and waits is not None:
        return waits.leave(out)
    if not on_device:
        return out
    known = {id(tensor.elem): tensor for tensor in held}
    place = held[0].device if wanted is None else torch.device(NAME, wanted.index or 0)

    def above(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Held(value, place)

    out = each(above, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if aliases(func) else out


@cache
def aliases(func: Any) -> bool:
    """Tell whether an operation writes in place, or returns a view."""
    return any(argument.alias_info is not None for argument in func._schema.arguments)


class Operations(TorchDispatchMode):
    """Operations on tensors, of which some are of the device."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.counted = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self.counted)


BACKWARD = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


class Functions(TorchFunctionMode):
    """Functions that take no tensor, and make one of the device; and backward passes.

    These are made in one thread, as autograd has none for a second device.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            device = torch.device(options.get("device") or torch.get_default_device())
            if device.type == NAME:
                return func(*args, **{**options, "device": "cpu"}).to(device)
        if func in BACKWARD:
            with torch.autograd.set_multithreading_enabled(False):
                return func(*args, **options)
        return func(*args, **options)


@contextmanager
def simulated() -> Iterator[Waits]:
    """Have the devices `DEVICE` and `SECOND` within the context, and count the waits for them."""
    waits = Waits()

    class Event:
        def __init__(self, device: Any = None, **options: Any) -> None:
            self.copies: list[tuple[Tensor, Tensor]] = []

        def record(self, stream: Any = None) -> None:
            self.copies = list(waits.copies)

        def query(self) -> bool:
            return False  # the host is always ahead

        def synchronize(self) -> None:
            waits.arrive(self.copies)

    with patch.object(BACKEND, "there", True), patch("torch.Event", Event), Functions(), Operations(waits):
        yield waits


@contextmanager
def judged() -> Iterator[Waits]:
    """Have the devices as `simulated`, and a judge that takes their tensors, which it refuses for computing their values."""
    module = importlib.import_module("ensemble_attacks.judge")
    stored = module.as_stored
    taken = patch.object(module, "as_stored", lambda t: t.detach() if isinstance(t, Held) else stored(t))
    with taken, simulated() as waits:
        yield waits
