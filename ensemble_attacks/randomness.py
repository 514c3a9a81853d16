"""Start the process's random generators at a seed, and put them back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start the global generators (torch's, CUDA's, numpy's, Python's) at ``seed`` within the context, and put them back."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            _seed_torch(int(seed))
            np.random.seed(int(seed) % 2**32)  # noqa: NPY002
            random.seed(int(seed))
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def _seed_torch(seed: int) -> None:
    """Start torch's generators at ``seed``.

    ``torch.manual_seed`` notes a traceback for every kind of accelerator that has not been used yet, which takes longer than
    a pass of a small model, and is in vain where there is none.
    """
    if _accelerated():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@cache
def _accelerated() -> bool:
    return torch.accelerator.is_available()
