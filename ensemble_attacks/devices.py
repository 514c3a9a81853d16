"""Bring values to a device and back, without making the host wait for it where that can be helped.

A host tells an accelerator what to compute, and goes on. Where it asks for a value, it waits until all that it has told
is done, which costs a small network as much as a pass.
"""

from __future__ import annotations

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


def _event(device: torch.device) -> torch.Event | None:
    """Return an event after all that a device has been told so far, or ``None`` where it has no events."""
    try:
        event = torch.Event(device)
        event.record()
    except (RuntimeError, NotImplementedError):
        return None
    return event
