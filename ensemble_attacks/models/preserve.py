"""Leave everything as it was found, also after an exception: a model's flags and buffers, and the process's random state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

from ensemble_attacks.devices import unlike
from ensemble_attacks.models.held import generators_of, modules_of
from ensemble_attacks.randomness import seeded


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore the training flag of every single module, every buffer, and the gradients of the parameters afterwards.

    ``model.train()`` on the whole would not do: it wakes batch norm in members that were in eval mode.
    """
    modules = modules_of(model)
    flags = [(module, module.training) for module in modules]
    buffers = [(module, name, buffer) for module in modules for name, buffer in module._buffers.items()]
    gradients = [(p, p.grad) for module in modules for p in module._parameters.values() if p is not None]
    held = [tensor for *_, tensor in (*buffers, *gradients) if isinstance(tensor, Tensor)]
    contents = [tensor.detach().clone() for tensor in held]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for tensor, content in unlike(list(zip(held, contents, strict=True))):
                tensor.copy_(content)


@contextmanager
def differentiable() -> Iterator[None]:
    """Let gradients be computed within the context, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor by itself, that gradients can be had through: a copy of one that was made in inference mode.

    It is to be called outside that mode (`differentiable`).
    """
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def in_training(model: nn.Module) -> bool:
    """Tell whether a model is being trained, as far as its parts' modes say so.

    A model that was put into eval mode as a whole is not, unless a part whose statistics would move was put back. A model
    that was not is, unless all that holds parameters or buffers is in eval mode.
    """
    if not model.training:
        return any(module.training and _tracks(module) for module in model.modules())
    holding = [module for module in model.modules() if module._parameters or module._buffers] or [model]
    return any(module.training for module in holding)


def _tracks(module: nn.Module) -> bool:
    """Tell whether a module keeps statistics of what it sees in training, as batch norm does."""
    return isinstance(module, (_NormBase, LazyModuleMixin)) or "running_mean" in module._buffers


def evaluating(model: nn.Module) -> None:
    """Put a model into eval mode, and leave active what is meant to be.

    What is in training mode within a model in eval mode was put there on purpose (Monte Carlo dropout, stochastic depth,
    noise of one's own), and stays, but for a part that holds one whose statistics would move. So does what holds no
    parameters in a model that nobody put into eval mode, but all of whose parameters are.
    """
    if model.training and in_training(model):
        model.eval()
    for module in model.modules():
        if module is not model and module.training and any(part.training and _tracks(part) for part in module.modules()):
            module.eval()


@contextmanager
def private_random_state(seed: int, *models: nn.Module) -> Iterator[None]:
    """Seed all random generators within the context, and put them back afterwards.

    These are the global ones (torch's, CUDA's, numpy's, Python's) and those that models hold, wherever (`held_by`). Only
    models with randomness of their own see the difference: attacks draw from generators of their own.
    """
    owned = generators_of(*models)
    states = [_state(generator) for generator in owned]
    with seeded(seed):
        try:
            for index, generator in enumerate(owned):
                _set_state(generator, _seeded(generator, int(seed) + index))
            yield
        finally:
            for generator, state in zip(owned, states, strict=True):
                _set_state(generator, state)


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _seeded(generator: Any, seed: int) -> Any:
    """Return the state of a generator of the same kind that starts at ``seed``."""
    if isinstance(generator, torch.Generator):
        return torch.Generator(generator.device).manual_seed(seed).get_state()
    if isinstance(generator, np.random.Generator):
        return type(generator.bit_generator)(seed).state
    return _state(type(generator)(seed % 2**32))  # numpy's RandomState, Python's Random
