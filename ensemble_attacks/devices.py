"""Bring values to a device and back, without making the host wait for it where that can be helped, and say how exactly it
computes.

A host tells an accelerator what to compute, and goes on. Where it asks for a value, it waits until all that it has told
is done, which costs a small network as much as a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


def at_hand(tensor: Tensor) -> bool:
    """Tell whether the host can read a tensor's values without waiting for a device."""
    return tensor.device.type == "cpu"


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device, without waiting for it; one that is there already as it is."""
    if at_hand(tensor) and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def numbers(values: Sequence[Tensor | float]) -> list[float]:
    """Return numbers, some of which are tensors (): the host waits once for those of a device."""
    of_device: dict[torch.device, list[Tensor]] = {}
    for value in values:
        if isinstance(value, Tensor):
            of_device.setdefault(value.device, []).append(value)
    read = {device: iter(torch.stack(tensors).tolist()) for device, tensors in of_device.items()}
    return [next(read[value.device]) if isinstance(value, Tensor) else value for value in values]


def unlike(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return those of pairs of tensors, each of one shape and device, whose values differ; the host waits once."""
    same = numbers([torch.equal(a, b) if at_hand(a) else (a == b).all() for a, b in pairs])
    return [pair for pair, as_before in zip(pairs, same, strict=True) if not as_before]


class Later:
    """A tensor that a device will have computed when the host comes to read it.

    What the device is told in between, it does while the host waits, if it has to. Where the device knows no events, the
    host waits at once.
    """

    def __init__(self, value: Tensor) -> None:
        self._copy, self._arrived = value, None
        if not at_hand(value):
            self._copy = value.to("cpu", non_blocking=True)
            self._arrived = _event(value.device)
            if self._arrived is None:
                self._copy = value.cpu()

    def read(self) -> Tensor:
        """Return the tensor, on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute products of float32 in float32 within the context, whatever the caller allows.

    That is not in TF32, as cuDNN's convolutions are unless it is told otherwise, nor in mixed precision.
    """
    backends: Any = torch.backends
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            products, convolutions = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        except RuntimeError:  # the caller has set single operations, which torch does not let one mix with these
            for library in (backends.cudnn, backends.mkldnn, backends.cuda):
                for name in ("matmul", "conv", "rnn"):
                    operation: Any = getattr(library, name, None)
                    if hasattr(operation, "fp32_precision"):
                        stack.callback(setattr, operation, "fp32_precision", operation.fp32_precision)
                        operation.fp32_precision = "ieee"
        else:
            stack.callback(torch.set_float32_matmul_precision, products)
            stack.callback(setattr, backends.cudnn, "allow_tf32", convolutions)
            torch.set_float32_matmul_precision("highest")
            backends.cudnn.allow_tf32 = False
        yield


def _event(device: torch.device) -> torch.Event | None:
    """Return an event after all that a device has been told so far, or ``None`` where it has no events."""
    try:
        event = torch.Event(device)
        event.record()
    except (RuntimeError, NotImplementedError):
        return None
    return event
