"""Leave everything as it was found: a model's flags and buffers, the process's random state. Also after an exception."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore the training flag of every single module, and the content of every buffer that changed.

    ``model.train()`` on the whole would not do: it wakes batch norm in members that were in eval mode.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for buffer, content in buffers:
                if not torch.equal(buffer, content):
                    buffer.copy_(content)


@contextmanager
def private_random_state(seed: int) -> Iterator[None]:
    """Seed the global generators (torch's, CUDA's, numpy's, Python's), and put them back afterwards.

    Only models with randomness of their own see the difference: attacks draw from generators of their own.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
