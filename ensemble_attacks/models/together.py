"""Members that one network computes together, and shows by a function of its own or as the rows of its answer.

Shape suffixes: M members, N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.errors import AggregateMismatchError
from ensemble_attacks.models.ask import as_module, ask_together
from ensemble_attacks.scores import differ

FEW = 8  # images that say in which order the rows stand


class Together(nn.Module):
    """Several members that one network computes together: images (N, ...) -> logits (M, N, K).

    Args:
        network: images (N, ...) -> (M, N, K), a list of M tensors (N, K), or rows (M * N, K), of which the first N are the
            first member's.

    Raises:
        TypeError: Where ``network`` is neither a module nor a function.
        ValueError: Where the answer is none of these.
        AggregateMismatchError: At the first images, where the rows stand in another order.
    """

    def __init__(self, network: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network = as_module(network)
        self.training = self.network.training
        self._ordered = False  # that rows stand in the order that is expected has been seen

    def forward(self, x: Tensor) -> Tensor:
        if not self._ordered and len(x) > 1:
            self._check_order(x[:FEW])
        return self._answer(x)

    def _answer(self, x: Tensor) -> Tensor:
        called = getattr(getattr(self.network, "function", self.network), "__name__", type(self.network).__name__)
        return ask_together(self.network, x, called)

    @torch.no_grad()
    def _check_order(self, x: Tensor) -> None:
        """Raise `AggregateMismatchError` where the rows of the first images alone say that all members of one image follow
        one another; a random network says nothing."""
        logits_MNK, alone_MnK = self._answer(x), self._answer(x[: len(x) // 2])
        if not _same(logits_MNK[:, : len(x) // 2], alone_MnK):
            members = len(logits_MNK)
            by_image, alone = (z.flatten(0, 1).unflatten(0, (-1, members)) for z in (logits_MNK, alone_MnK))
            if _same(by_image[: len(alone)], alone):
                raise AggregateMismatchError(
                    f"the rows of {type(self.network).__name__} hold all members of an image one after another: members "
                    "come first, (M, N, K) or (M * N, K); transpose them"
                )
        self._ordered = True


def _same(first: Tensor, second: Tensor) -> bool:
    return not differ(first.flatten(0, 1), second.flatten(0, 1))
