"""Make a faster twin of a model to craft on: batch norm folded into the convolutions, ``channels_last``, parameters frozen.

The judge never sees it: images crafted on the twin are judged on the original, and an image that fools the twin alone is
crafted again on the original.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.optimization import fuse

from ensemble_attacks.models.ask import ask, ask_members
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.passes import CountingModel
from ensemble_attacks.models.preserve import differentiable, private_random_state

logger = logging.getLogger(__name__)
TOLERANCE = 1e-3, 0.05  # of the folded model's scores, relative to the largest, and of its gradient, relative to its length
AMP_TOLERANCE = 0.1, 0.5  # in mixed precision, which keeps eight bits
PARTS = ("frontend",)  # that attacks ask for by name: what holds one is not folded as a whole
SEEN = 8  # images on which a twin is compared, where as many fit into a batch
SEEDS = range(1, 9)  # of the comparisons; tracing runs with another, lest a draw that it freezes passes for the model's


@torch.no_grad()
def prepare(model: nn.Module, x: Tensor, *, amp: bool = False) -> nn.Module:
    """Return a twin of ``model`` that computes the same, faster, or the model itself where there can be none.

    Args:
        model: an ensemble (whose members are folded) or any other model, in eval mode.
        x: some real images (N, C, H, W), on which the twin's scores and gradients must be the original's, draw for draw.
        amp: whether to run what was folded in mixed precision (bfloat16 convolutions); scores come out, and votes are
            counted, in the images' type.
    """
    if isinstance(model, CountingModel):
        return model  # a copy would count for itself
    if model.training:
        return model
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return model  # a folded module would not call them
    try:
        with private_random_state(0, model):  # tracing runs the model's own code
            folded = _folded(copy.deepcopy(model)).eval().requires_grad_(False)
    except Exception as error:  # networks that cannot be copied, traced or frozen say so in many ways
        logger.debug("not prepared: %s (%s)", type(model).__name__, error)
        twin = None
    else:  # the layout does not suit networks that call view, or hold tensors of five dimensions
        twin = _sound(lambda: copy.deepcopy(folded).to(memory_format=torch.channels_last), model, x, TOLERANCE)
        twin = twin or _sound(lambda: folded, model, x, TOLERANCE)
    if not amp:
        return twin or model
    mixed = _sound(lambda: _mixed(copy.deepcopy(twin)).eval(), model, x, AMP_TOLERANCE) if twin else None
    if mixed is None:
        logger.warning("%s is not run in mixed precision: it cannot be prepared so", type(model).__name__)
    return mixed or twin or model


def _sound(make: Callable[[], nn.Module], model: nn.Module, x: Tensor, tolerance: tuple[float, float]) -> nn.Module | None:
    """Return the twin that ``make`` makes; ``None`` where it fails or computes something else."""
    try:
        with redirect_stderr(StringIO()):  # torch.fx prints the code that fails
            _check(twin := make(), model, x, tolerance)
    except Exception as error:
        logger.debug("a twin of %s is not used: %s", type(model).__name__, error)
        return None
    return twin


def _check(twin: nn.Module, model: nn.Module, x: Tensor, tolerance: tuple[float, float]) -> None:
    """Raise a `ValueError` unless both compute the same, draw for draw, within ``tolerance``.

    The tolerances are a share of the largest score, and of the gradient's length: tracing forgets a backward pass that the
    model defines itself, and where it wants no gradient.
    """
    for seed in SEEDS:
        images = x if seed == SEEDS[0] else x[:1]
        expected, scores = (_scores(net, images, seed) for net in (model, twin))
        if not (scores - expected).abs().max() <= tolerance[0] * expected.abs().max():
            raise ValueError("it computes something else")
    expected, gradient = (_gradient(net, x) for net in (model, twin))
    if not (gradient - expected).norm() <= tolerance[1] * expected.norm():
        raise ValueError("its gradient is another")


def _folded(module: nn.Module) -> nn.Module:
    """Return the module, folded as a whole where that is possible and no attack looks inside; else fold its children."""
    looked_into = hasattr(module, "member_logits") or any(name.split(".")[-1] in PARTS for name, _ in module.named_modules())
    if not looked_into:
        try:
            return fuse(module)
        except Exception as error:  # torch.fx cannot trace every network
            logger.debug("%s is folded by its children (%s)", type(module).__name__, error)
    for name, child in module.named_children():
        setattr(module, name, _folded(child))
    return module


def _mixed(module: nn.Module) -> nn.Module:
    """Return the module with every network that was folded as a whole in mixed precision."""
    if isinstance(module, GraphModule):
        return Autocast(module)
    for name, child in module.named_children():
        setattr(module, name, _mixed(child))
    return module


class Autocast(nn.Module):
    """A network that runs in mixed precision: (N, C, H, W) -> scores in the type of its input."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            scores = self.net(x)
        return scores.to(x.dtype)


def _gradient(net: nn.Module, x: Tensor) -> Tensor:
    """Return the input gradient of a random combination of the scores, or zero where there is none."""
    images = x.detach().clone().requires_grad_()
    with differentiable():
        scores = _scores(net, images, SEEDS[0])
        weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(scores)
        (gradient,) = (
            torch.autograd.grad((weights * scores).sum(), images, allow_unused=True) if scores.requires_grad else (None,)
        )
    return torch.zeros_like(images) if gradient is None else gradient.nan_to_num()


def _scores(net: Any, x: Tensor, seed: int) -> Tensor:
    with guarded(net, seed=seed, evaluate=False):
        return ask_members(net, x) if hasattr(net, "member_logits") else ask(net, x)
