"""Leave everything as it was found: a model's flags and buffers, the process's random state. Also after an exception."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore the training flag of every single module, every buffer, and the gradients of the parameters.

    ``model.train()`` on the whole would not do: it wakes batch norm in members that were in eval mode.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    gradients = [(p, p.grad, None if p.grad is None else p.grad.detach().clone()) for p in model.parameters()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, content in buffers:
                module._buffers[name] = _restored(buffer, content)
            for parameter, gradient, content in gradients:
                parameter.grad = _restored(gradient, content)


def _restored(tensor: Tensor | None, content: Tensor | None) -> Tensor | None:
    if tensor is not None and content is not None and not torch.equal(tensor, content):
        tensor.copy_(content)
    return tensor


@contextmanager
def private_random_state(seed: int, model: nn.Module) -> Iterator[None]:
    """Seed the global generators (torch's, CUDA's, numpy's, Python's) and those that parts of the model own, as attributes
    called ``generator``, and put them back afterwards.

    Only models with randomness of their own see the difference: attacks draw from generators of their own.
    """
    owned: list[Any] = [getattr(module, "generator", None) for module in model.modules()]
    owned = [generator for generator in owned if isinstance(generator, torch.Generator)]
    states = [generator.get_state() for generator in owned]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            torch.manual_seed(int(seed))
            np.random.seed(int(seed) % 2**32)  # noqa: NPY002
            random.seed(int(seed))
            for index, generator in enumerate(owned):
                generator.manual_seed(int(seed) + index)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            for generator, state in zip(owned, states, strict=True):
                generator.set_state(state)
