"""Implement ``dverge``: Diversifying Vulnerabilities for Enhanced Robust Generation of Ensembles (Yang et al., NeurIPS
2020), which teaches each member to resist the images that distil the non-robust features of the others.

It follows the released code: it starts from the standard ensemble; each epoch distils one layer, drawn at random; SGD.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from defenses.standard import cross_entropy_sum
from defenses.training import Batch, Recipe, sgd
from defenses.training.ascent import STEPS, sign_ascent


class _Reached(Exception):
    """A signal that the forward pass has come as far as it is needed."""


def layers(member: Any) -> list[nn.Module]:
    """Return the modules that put out the features before the nonlinearities, in order, the logits last.

    In ResNet-20 there are twenty. They are those that the member names (``pre_activations``), or its batch norms, or
    convolutions if it has none, and linear layers.
    """
    if hasattr(member, "pre_activations"):
        return member.pre_activations()
    normed = any(isinstance(module, nn.BatchNorm2d) for module in member.modules())
    kinds = (nn.BatchNorm2d if normed else nn.Conv2d, nn.Linear)
    return [module for module in member.modules() if isinstance(module, kinds)]


def features(member: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """Return the output of ``layer``, flattened to (N, D); nothing beyond it is computed."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen.append(output)
        raise _Reached

    handle = layer.register_forward_hook(stop)
    try:
        member(x)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0].flatten(1).float()


def distil(batch: Batch, member: int, targets: Tensor, layer: int) -> Tensor:
    """Return images near ``batch.x`` whose features in ``member`` are those of ``targets`` (DVERGE, eq. 1), (N, C, H, W).

    They are made by ten signed steps of eps / 10 with momentum 1, which minimise the squared distance.
    """
    net: nn.Module = batch.ensemble.members[member]
    at = layers(net)[layer]
    with batch.crafting(), batch.autocast():
        with torch.no_grad():
            wanted_ND = features(net, at, targets)
        eps = batch.data.distillation_eps
        distance = lambda x: -(features(net, at, x) - wanted_ND).square().mean(-1)  # noqa: E731
        return sign_ascent(distance, batch.x, eps=eps, step=eps / STEPS, momentum=1.0)


def loss(batch: Batch) -> Tensor:
    """Return ``sum_i sum_{j != i} CE(f_i(distilled_j), y)``, batch mean (DVERGE, eq. 3).

    The distilled images are made first, so that one step on the sum is a step of every member on its own part.
    """
    members = len(batch.ensemble.members)
    count = len(layers(batch.ensemble.members[0]))
    layer = int(torch.randint(count, (), generator=torch.Generator().manual_seed(batch.epoch_seed)))
    targets = batch.other_images()
    distilled = [distil(batch, member, targets, layer) for member in range(members)]
    pairs = permutations(range(members), 2)
    return cross_entropy_sum(torch.stack([batch.logits(distilled[j], i) for i, j in pairs]), batch.y)


RECIPE = Recipe(
    name="dverge",
    loss=loss,
    optimizer=sgd,
    max_lr=0.1,
    start_from="standard",
    summary="DVERGE (Yang et al. 2020) from the standard ensemble, a random layer each epoch; SGD with Nesterov momentum "
    "0.9, weight decay 5e-4.",
)
