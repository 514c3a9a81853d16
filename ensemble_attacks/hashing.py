"""What models hold, told apart by a hash."""

from __future__ import annotations

from hashlib import sha256

import torch
from torch import Tensor


def digest(*values: object) -> str:
    """A hash of tensors, by types, shapes and values; of whatever else a model's state holds, by what it prints."""
    state = sha256()
    for value in values:
        if not isinstance(value, Tensor):
            state.update(repr(value).encode())
            continue
        tensor = value.int_repr() if value.is_quantized else value
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
