"""A faster twin of an ensemble to craft on: batch norm folded into the convolutions, ``channels_last``, parameters frozen.

The judge never sees it: images crafted on the twin are judged on the original.
"""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from ensemble_attacks.ensembles import Ensemble

logger = logging.getLogger(__name__)
TOLERANCE = 1e-3  # of the folded members' logits, relative to the largest; float32 folding stays below 1e-5


@torch.no_grad()
def prepare(model: nn.Module, x: Tensor) -> nn.Module:
    """A twin of ``model`` that computes the same, faster; the model itself where there is nothing to fold or it cannot be.

    Args:
        model: an `Ensemble` in eval mode; any other module is returned as it is.
        x: some real images (N, C, H, W), on which the twin's members must agree with the originals.
    """
    if type(model) is not Ensemble or model.training:
        return model
    members = []
    for member in model.members:
        try:
            twin = fuse(copy.deepcopy(member))
        except Exception as error:  # torch.fx cannot trace every network, and says so in many ways
            logger.debug("not prepared: %s cannot be traced (%s)", type(member).__name__, error)
            return model
        expected = member(x)
        if (twin(x) - expected).abs().max() > TOLERANCE * expected.abs().max():
            logger.debug("not prepared: the folded %s computes something else", type(member).__name__)
            return model
        members.append(twin.to(memory_format=torch.channels_last).requires_grad_(False))
    return Ensemble(members, str(model.vote)).eval()
