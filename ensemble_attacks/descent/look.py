"""Look at iterates: scores, success and gradient come from the same forward pass; of a random model, they are means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ensemble_attacks.descent.objectives import Goal, Objective
from ensemble_attacks.devices import Later, at_hand, placed
from ensemble_attacks.models.view import Forward, Outputs

CONFIRMING = 20  # further draws of a sample that no draw has been right on, before it leaves
NO_GRADIENT = (
    "the model's scores have no gradient: stand in for the part that stops it (BPDAIdentity, Surrogate), estimate it "
    "(ZeroOrder), or use an attack that needs none (square)"
)
TIE = 1e-3  # what the mean margin counts beside the probability of being right


@dataclass(frozen=True)
class Draws:
    """A plan of how a random model is looked at.

    Attributes:
        count: the number of forward passes of every iterate.
        per_pass: how many of them go through the model as one batch; more than one only where a model draws for every image
            of a batch by itself.
    """

    count: int
    per_pass: int = 1


class Point(NamedTuple):
    """A record of what was seen at iterates (N, C, H, W): the mean over draws of scores and loss, and the loss's gradient.

    ``margin_N`` is negative where the sample is fooled. It is the margin of a deterministic model; of a random one it is the
    probability of being right, with the mean margin to break ties. ``forwards`` and ``backwards`` are the image passes
    spent.
    """

    scores_NK: Tensor
    margin_N: Tensor
    loss_N: Tensor
    gradient: Tensor | None
    forwards: int
    backwards: int

    def at(self, rows: Tensor) -> Point:
        """Return what was seen of some samples, with no passes, which have been counted already."""
        gradient = None if self.gradient is None else self.gradient[rows]
        return Point(self.scores_NK[rows], self.margin_N[rows], self.loss_N[rows], gradient, 0, 0)


def expected_margin(right_N: Tensor, margin_N: Tensor) -> Tensor:
    """Return values (N,) that order samples by the probability of being right, then by mean margin.

    They are negative where that probability is 0.
    """
    closeness_N = 0.5 + margin_N.atan() / math.pi
    return torch.where(right_N > 0, right_N, -1.0) + TIE * closeness_N


def verdict(outputs: Outputs, goal: Goal) -> tuple[Tensor, Tensor]:
    """Return the probability of being right, or of not being where an attack aims, and the mean margin; (N,), (N,)."""
    if outputs.verdict_ENK is None:
        margin_N = goal.margin(outputs.scores_NK.detach())
        return (~(margin_N < 0)).to(margin_N), margin_N
    margin_EN = goal.margin(outputs.verdict_ENK.detach())
    weights_E = margin_EN.new_ones(1) if outputs.weights_E is None else outputs.weights_E.to(margin_EN)
    return weights_E @ (~(margin_EN < 0)).to(margin_EN), weights_E @ margin_EN


def look(
    forward: Forward,
    x: Tensor,
    goal: Goal,
    objective: Objective | None,
    draws: Draws | None,
    among: Tensor | None = None,
) -> Point:
    """Return scores, success and, with an ``objective``, its loss and gradient at ``x``, all from one forward pass.

    The draws of a random model are accumulated, so that memory does not grow with their number.

    Args:
        forward: images (N, C, H, W) -> `Outputs`.
        x: the iterates, (N, C, H, W).
        goal: what counts as success.
        objective: what is maximised; ``None``: no loss and no gradient are computed.
        draws: how a random model is looked at; ``None``: the model is deterministic.
        among: whose success is asked about, (N,) bool; ``None``: all samples'.

    Raises:
        ValueError: Where the loss has no gradient with respect to the images.
    """
    count, at_once = (1, 1) if draws is None else (draws.count, draws.per_pass)
    x = x.detach().requires_grad_(objective is not None)
    right_N = margin_N = loss_N = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    scores_NK = torch.zeros((), dtype=x.dtype, device=x.device)
    gradient: Tensor | None = None
    random, backwards = draws is not None, 0
    doubted: Later | None = None
    chunks = _chunks(count, at_once)
    for index, copies in enumerate(chunks, start=1):
        own = goal.tile(copies)
        with torch.set_grad_enabled(objective is not None):
            outputs = forward(tile(x, copies))
        right, lead = verdict(outputs, own)
        right_N, margin_N = right_N + total(right, copies), margin_N + total(lead, copies)
        scores_NK = scores_NK + total(outputs.scores_NK.detach(), copies)
        random = random or outputs.weights_E is not None
        if draws is not None and index == len(chunks):  # read when the device has the last draw's gradient to compute
            doubted = Later((right_N == 0) if among is None else (right_N == 0) & among)
        if objective is None or (draws is None and at_hand(right) and not right.any()):
            continue
        with torch.enable_grad():
            loss = objective(outputs, own)
        (part,) = torch.autograd.grad(loss.sum(), x, allow_unused=True) if loss.requires_grad else (None,)
        if part is None:
            raise ValueError(NO_GRADIENT)
        gradient = part if gradient is None else gradient + part
        loss_N = loss_N + total(loss.detach(), copies)
        backwards += copies * len(x)
    if objective is not None and gradient is None:
        gradient = torch.zeros_like(x)  # all are fooled
    forwards, seen = count * len(x), torch.full_like(right_N, count)
    rows = torch.arange(0) if doubted is None else torch.nonzero(doubted.read()).squeeze(-1)
    if len(rows):  # before a sample leaves on these draws, others have to confirm them
        doubtful = placed(rows, x.device)
        forwards += CONFIRMING * len(doubtful)
        seen[doubtful] += CONFIRMING
        sums = right_N[doubtful], margin_N[doubtful]
        right_N[doubtful], margin_N[doubtful] = confirmed(
            forward, x.detach()[doubtful], goal.select(doubtful), at_once, *sums
        )
    if random:
        margin_N = expected_margin(right_N / seen, margin_N / seen)
    return Point(scores_NK / count, margin_N, loss_N / count, gradient, forwards, backwards)


@torch.no_grad()
def confirmed(
    forward: Forward, x: Tensor, goal: Goal, at_once: int, right_N: Tensor, margin_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sums of `verdict`, with those over `CONFIRMING` further draws added; (N,), (N,)."""
    for copies in _chunks(CONFIRMING, at_once):
        right, lead = verdict(forward(tile(x, copies)), goal.tile(copies))
        right_N, margin_N = right_N + total(right, copies), margin_N + total(lead, copies)
    return right_N, margin_N


def tile(t: Tensor, copies: int) -> Tensor:
    """Repeat a tensor along its first dimension, (N, ...) -> (copies * N, ...)."""
    return t if copies == 1 else t.repeat(copies, *[1] * (t.dim() - 1))


def total(t: Tensor, copies: int) -> Tensor:
    """Sum a tensor over copies, (copies * N, ...) -> (N, ...)."""
    return t if copies == 1 else t.view(copies, -1, *t.shape[1:]).sum(0)


def _chunks(count: int, size: int) -> list[int]:
    """Split ``count`` into parts of ``size``, and return their sizes."""
    return [size] * (count // size) + ([count % size] if count % size else [])
