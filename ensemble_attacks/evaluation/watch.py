"""Trace the convergence of anybody's attack, by the images that it asks the model about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ensemble_attacks.descent.stages import NEVER
from ensemble_attacks.evaluation.settings import Settings
from ensemble_attacks.judge import outside
from ensemble_attacks.models.passes import CountingModel
from ensemble_attacks.norms import NORMS
from ensemble_attacks.scores import decided

FEATURES = 256  # by so many of its features, evenly spread, an image is told from the others
FINE = 128  # a row of the trace is one step of each sample, beyond so many as many as share their leading bits


class Watch:
    """What an attack was seen to do: of each sample, its passes, and the first of them that showed a success.

    An image that the model is asked about is taken for one of the sample whose clean image is nearest to it in the norm of
    the ball, and for a success if it lies in that ball and the model errs on it.
    """

    def __init__(self, x: Tensor, y: Tensor, settings: Settings) -> None:
        """Watch an attack on images ``x`` (N, ...) with labels (N,)."""
        self._x, self._y, self._settings = x, y.cpu(), settings
        self._stride = -(-x[0].numel() // FEATURES)
        self._keys_NF = self._key(x)
        self._steps_N = torch.zeros(len(x), dtype=torch.long)  # forward passes so far
        self._fooled_N = torch.full_like(self._steps_N, NEVER)
        self._passes_2T = torch.zeros(2, 1, dtype=torch.long)  # forward and backward ones of all samples, step by step

    def see(self, images: Tensor, scores: Tensor) -> Callable[[], None]:
        """Book a forward pass of images (B, ...) with scores (B, K); return what books their backward pass.

        Images of another shape are those of no sample, and are not booked.
        """
        if not len(images) or images.shape[1:] != self._x.shape[1:]:
            return lambda: None
        images, scores = images.detach(), scores.detach()
        self._keys_NF = self._keys_NF.to(images.device)
        order = NORMS[self._settings.norm].order
        rows = torch.cdist(self._key(images), self._keys_NF, p=order).argmin(1).cpu()
        steps, wrong = self._steps_N[rows], decided(scores).cpu() & (scores.argmax(-1).cpu() != self._y[rows])
        new = torch.nonzero(wrong & (self._fooled_N[rows] == NEVER)).squeeze(-1)
        if len(new):
            left = self._outside(rows[new], images[new.to(images.device)]).cpu()
            self._fooled_N[rows[new[~left]]] = steps[new[~left]]
        self._steps_N.index_add_(0, rows, torch.ones_like(rows))
        self._book(0, steps)
        return partial(self._book, 1, steps)

    def rows(self) -> list[dict[str, Any]]:
        """Return rows as of `Trace.rows`, of a single stage; those of many steps come after the last of them."""
        fooled_T = torch.bincount(self._fooled_N[self._fooled_N < NEVER], minlength=self._passes_2T.shape[1])
        last_T = torch.tensor([_last(step) for step in range(len(fooled_T))])
        rows, robust = [], len(self._x)
        for step in last_T.unique().tolist():
            forwards, backwards, fooled = (part[last_T == step].sum().item() for part in (*self._passes_2T, fooled_T))
            robust -= fooled
            counted = dict(fooled=fooled, robust=robust, forwards=forwards, backwards=backwards)
            rows.append({"stage": 0, "step": step, **counted, "loss": None})
        return rows

    def _key(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :: self._stride].float()

    def _outside(self, rows: Tensor, images: Tensor) -> Tensor:
        of = self._settings
        mask = of.mask[rows] if of.mask is not None and of.mask.shape == self._x.shape else of.mask
        return outside(self._x[rows.to(self._x.device)], images, eps=of.eps, norm=of.norm, box=of.box, mask=mask)

    def _book(self, kind: int, steps: Tensor) -> None:
        if (more := int(steps.max()) + 1 - self._passes_2T.shape[1]) > 0:
            self._passes_2T = torch.nn.functional.pad(self._passes_2T, (0, max(more, self._passes_2T.shape[1])))
        self._passes_2T[kind].index_add_(0, steps, torch.ones_like(steps))


def _last(step: int) -> int:
    """Return the last step of the row that a step is booked in, whatever the run: the leading bits of both are the same."""
    bits = max(0, step.bit_length() - FINE.bit_length() + 1)
    return step | ((1 << bits) - 1)


@contextmanager
def watched(model: CountingModel, x: Tensor, y: Tensor, settings: Settings) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Watch what an attack asks a model within the context; yield what returns the rows of its trace.

    There are none of a random model: one draw is no success.
    """
    if settings.draws > 1 or settings.eot_iter is not None or not len(x):
        yield list
        return
    watch = Watch(x, y, settings)
    model.watch = watch.see
    try:
        yield watch.rows
    finally:
        model.watch = None
