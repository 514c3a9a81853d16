"""Decide what is 'robust' or 'fooled': no other code does, and it goes by stored images and fresh forward passes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.data import as_tensors
from ensemble_attacks.devices import full_precision
from ensemble_attacks.errors import OutOfBallError
from ensemble_attacks.models.ask import as_module, ask, beside, check_dtype, classes_of
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.preserve import private_random_state
from ensemble_attacks.norms import NORMS, UNIT, Box, in_parts
from ensemble_attacks.scores import decided, margin
from ensemble_attacks.validation import (
    check_count,
    check_dense,
    check_eps,
    check_images,
    check_label_range,
    check_labels,
    check_mask,
    check_norm,
    check_radius,
    check_seed,
)


@dataclass(frozen=True, eq=False)
class Judgement:
    """A verdict on N samples.

    Attributes:
        robust: (N,) bool: predicted right in more than half of the draws.
        fooled: (N,) bool: all other samples but the invalid ones.
        invalid: (N,) bool: scores in any draw that decide nothing (`decided`); neither robust nor fooled.
        correct: (draws, N) bool: predicted right in each draw; never for an invalid sample.
        margin: (N,): by how much the label's score leads the best other one, in the first draw.
    """

    robust: Tensor
    fooled: Tensor
    invalid: Tensor
    correct: Tensor
    margin: Tensor

    @property
    def accuracy(self) -> float:
        """Return the share of right predictions over samples and draws, in [0, 1]."""
        return self.correct.double().mean().item()

    @property
    def worst_of_draws(self) -> float:
        """Return the share of samples predicted right in every draw, in [0, 1]."""
        return self.correct.all(0).double().mean().item()

    @property
    def interval(self) -> tuple[float, float]:
        """Return the Wilson 95% interval of the accuracy over samples."""
        n = len(self.robust)
        return wilson_interval(self.accuracy * n, n)

    def summary(self) -> dict[str, float | int | list[float]]:
        """Return counts and rates, for printing and storing."""
        summary: dict[str, float | int | list[float]] = {
            "n": len(self.robust),
            "robust": int(self.robust.sum()),
            "fooled": int(self.fooled.sum()),
            "invalid": int(self.invalid.sum()),
            "accuracy": self.accuracy,
            "interval": list(self.interval),
        }
        if len(self.correct) > 1:
            summary["draws"] = len(self.correct)
            summary["worst_of_draws"] = self.worst_of_draws
        return summary

    def __str__(self) -> str:
        low, high = self.interval
        text = f"{100 * self.accuracy:.1f}% robust [{100 * low:.1f}, {100 * high:.1f}] of {len(self.robust)}"
        invalid = int(self.invalid.sum())
        return text + (f"; {invalid} invalid (NaN scores, or an infinite best one)" if invalid else "")


def wilson_interval(successes: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion, by default at 95%.

    ``successes`` may be fractional (a mean over draws).
    """
    if n < 1:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def as_stored(tensor: Tensor) -> Tensor:
    """Return the values of a tensor as a plain one: a subclass may measure or compare otherwise than torch does.

    Raises:
        TypeError: Where it has no values of its own, but computes them.
    """
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(f"images and labels must be plain tensors, got a {type(tensor).__name__}, which computes its values")
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(Tensor)


Radius = float | Tensor


def distances(x: Tensor, x_adv: Tensor, norm: str) -> Tensor:
    """Return the size of every sample's perturbation, (N,), in float64."""
    delta = (x_adv.double() - x.double()).flatten(1)
    return delta.norm(NORMS[norm].order, dim=1)


def rounding(images: Tensor) -> float:
    """Return one unit in the last place of 1, in float32 or the images' type, whichever is finer."""
    return min(torch.finfo(images.dtype).eps, torch.finfo(torch.float32).eps)


def allowed(x_adv: Tensor, norm: str, eps: Radius, box: Box = UNIT) -> float:
    """Return by how much rounding may have carried images out of the ball, had each pixel moved by `rounding`.

    It is never more than eps, of several the largest: a step that rounding makes of one within the ball is at most twice as
    long.
    """
    pixels = x_adv[0].numel()
    most = eps.max().item() if isinstance(eps, Tensor) else eps
    return min(rounding(x_adv) * box.magnitude * pixels ** (1 / NORMS[norm].order), most)


def beyond(x: Tensor, x_adv: Tensor, eps: Radius, norm: str, mask: Tensor | None) -> Tensor:
    """Return by how much each sample leaves the ball, (N,), in float64.

    With eps for each feature, Linf measures the feature that leaves its own by most, another norm what moved in units of
    eps, brought back to the largest. What may not move may move by 0.
    """
    if not isinstance(eps, Tensor):
        excess = distances(x, x_adv, norm) - eps
        still = torch.zeros_like(x_adv, dtype=torch.bool) if mask is None else ~mask.to(x_adv.device).expand_as(x_adv)
    else:
        moved, reach = (x_adv.double() - x.double()).abs(), eps.to(x_adv.device).double().expand_as(x_adv)
        still = (reach == 0) if mask is None else (reach == 0) | ~mask.to(x_adv.device).expand_as(x_adv)
        if NORMS[norm].order == float("inf"):
            excess = (moved - reach).flatten(1).amax(1)
        else:
            excess = (NORMS[norm].size(torch.where(still, 0, moved / reach)) - 1) * reach.max()
    if not still.any():
        return excess
    stirred = torch.where(still, (x_adv.double() - x.double()).abs(), 0).flatten(1).amax(1)
    return torch.where(stirred > 0, excess.maximum(stirred), excess)


@dataclass(frozen=True, eq=False)
class Measured:
    """A record of where images lie, one value each: whether they are finite, and by how much they leave box and ball."""

    finite: Tensor
    beyond_box: Tensor
    beyond_ball: Tensor


@torch.no_grad()
def measured(x: Tensor, x_adv: Tensor, *, eps: Radius, norm: str, box: Box, mask: Tensor | None) -> Measured:
    """Return where images (N, ...) lie, in float64, a few at a time, whichever devices they are on."""
    # Filled rather than joined: small results between large ones that are freed would break up the memory.
    beyond_box, beyond_ball = torch.empty(2, len(x_adv), dtype=torch.double, device=x_adv.device)
    found = Measured(torch.empty(len(x_adv), dtype=torch.bool, device=x_adv.device), beyond_box, beyond_ball)
    for part in in_parts(x_adv):
        exact = x_adv[part].double()
        found.finite[part] = torch.isfinite(exact).flatten(1).all(1)
        found.beyond_box[part] = box.excess(exact)
        own = mask[part] if mask is not None and mask.shape == x.shape else mask
        found.beyond_ball[part] = beyond(x[part].to(x_adv.device), exact, eps, norm, own)
    return found


def outside(
    x: Tensor, x_adv: Tensor, *, eps: Radius, norm: str = "Linf", box: Box = UNIT, mask: Tensor | None = None
) -> Tensor:
    """Return the samples that `check_adversarial` would raise an error for, (N,) bool; also in the norm L1."""
    if not len(x):
        return torch.zeros(0, dtype=torch.bool)
    found = measured(x, x_adv, eps=eps, norm=norm, box=box, mask=mask)
    out_of_box = found.beyond_box > rounding(x_adv) * box.magnitude
    return out_of_box | ~found.finite | ~(found.beyond_ball <= allowed(x_adv, norm, eps, box))


def or_clean(
    x: Tensor, x_adv: Tensor, *, eps: Radius, norm: str = "Linf", box: Box = UNIT, mask: Tensor | None = None
) -> Tensor:
    """Return ``x_adv`` with the clean image in place of every one that is `outside`: no success, and no error either."""
    left = outside(x, x_adv, eps=eps, norm=norm, box=box, mask=mask)
    if not left.any():
        return x_adv
    return x_adv.index_copy(0, rows := torch.nonzero(left).squeeze(-1), x[rows.to(x.device)].to(x_adv))


def check_adversarial(
    x: Tensor, x_adv: Tensor, *, eps: Radius, norm: str = "Linf", box: Box = UNIT, mask: Tensor | None = None
) -> None:
    """Raise `OutOfBallError` unless every image is finite, in the box and within ``eps`` of its clean image.

    The distances are measured in float64. What rounding to float32 may add is allowed, whatever the images' type: one unit
    in the last place of 1 (1.2e-7) per pixel for Linf and the box, times the square root of the number of pixels for L2.
    """
    found = measured(x, x_adv, eps=eps, norm=norm, box=box, mask=mask)
    bad = torch.nonzero(~found.finite).squeeze(-1)
    if len(bad):
        raise OutOfBallError(f"x_adv[{bad[0]}] is not finite ({len(bad)} of {len(x_adv)} images are not)")
    excess = found.beyond_box
    bad = torch.nonzero(excess > rounding(x_adv) * box.magnitude).squeeze(-1)
    if len(bad):
        raise OutOfBallError(f"x_adv[{bad[0]}] leaves {box} by {excess[bad[0]]:.3g} ({len(bad)} of {len(x_adv)} images do)")
    excess = found.beyond_ball
    bad = torch.nonzero(excess > allowed(x_adv, norm, eps, box)).squeeze(-1)
    if len(bad):
        raise OutOfBallError(
            f"x_adv[{bad[0]}] leaves the {norm} ball of eps = {_said(eps)} by {excess[bad[0]]:.3g} "
            f"({len(bad)} of {len(x_adv)} images do): was eps given in pixel units of {box}?"
        )


def _said(eps: Radius) -> str:
    return f"{eps.min():.6g} to {eps.max():.6g}" if isinstance(eps, Tensor) else f"{eps:.6g}"


def judge(
    model: nn.Module,
    x: Any,
    y: Tensor | None = None,
    x_adv: Tensor | None = None,
    *,
    eps: Radius,
    norm: str = "Linf",
    draws: int = 1,
    batch_size: int = 250,
    seed: int = 2**31 - 1,
    box: Box = UNIT,
    mask: Tensor | None = None,
) -> Judgement:
    """Decide, for every sample, whether ``x_adv`` fools ``model``, from fresh forward passes.

    Args:
        model: images in the box -> scores (N, K); judged in eval mode (`evaluating`), on the device of its parameters.
        x, y, x_adv: clean images, their classes, and the images to judge; (N, ...), (N,), (N, ...), such as (N, C, H, W).
            Without ``y``, ``x`` is a pair of both, a ``Dataset``, or a ``DataLoader``, which is read once.
        eps, norm, box: the radius and norm of the ball, and the values that images can take; eps in their units, a number or
            one for each feature.
        mask: what may move, bool, of one image (...) or of each; ``None``: all.
        draws: the number of fresh forward passes of each image, for a model that is random.
        batch_size: the number of images per forward pass.
        seed: the seed of the model's own randomness; apart from the seeds that attacks use, so that no draw is one they saw.

    Returns:
        The verdict on each sample.

    Raises:
        OutOfBallError: Where an image lies outside the ball or the box; the message names the sample and the excess.
        TypeError, ValueError: Where arguments cannot be used.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> x, y = torch.rand(8, 1, 2, 2), torch.zeros(8, dtype=torch.long)
    >>> judge(model, x, y, x, eps=0.1).summary()["n"]
    8
    """
    model = as_module(model)
    check_norm(norm)
    check_eps(eps)
    check_count("draws", draws)
    check_count("batch_size", batch_size)
    check_seed(seed)
    x, y = as_tensors(x, y)
    check_images(x, "x", box=box)
    check_labels(y, x, "y")
    if not len(x):
        raise ValueError("x holds no images: there is nothing to judge")
    if not isinstance(x_adv, Tensor):
        raise TypeError(f"x_adv must be a torch.Tensor, got {type(x_adv).__name__}")
    check_dense(x_adv, "x_adv")
    if x_adv.shape != x.shape:
        raise ValueError(f"x_adv has shape {tuple(x_adv.shape)}, x has {tuple(x.shape)}: they must be the same")
    if not x_adv.is_floating_point():
        raise TypeError(f"x_adv has dtype {x_adv.dtype}: expected floating point in {box}")
    x, x_adv, y = as_stored(x), as_stored(x_adv), as_stored(y).long()
    eps = as_stored(eps) if isinstance(eps, Tensor) else eps
    mask = as_stored(mask) if isinstance(mask, Tensor) else mask
    check_radius(eps, norm, x[0], box)
    check_mask(mask, x)
    check_adversarial(x, x_adv, eps=eps, norm=norm, box=box, mask=mask)

    correct, finite, margins = [], [], []
    with guarded(model, seed=seed), full_precision(), torch.no_grad():
        check_dtype(model, x_adv, "x_adv")
        with private_random_state(seed, model):
            check_label_range(y, classes_of(model, beside(model, x_adv[:2])), "y")
        for _ in range(draws):
            for images, labels in zip(x_adv.split(batch_size), y.split(batch_size), strict=True):
                scores_NK = ask(model, beside(model, images)).cpu()
                correct.append(scores_NK.argmax(1) == labels.cpu())
                finite.append(decided(scores_NK))
                margins.append(margin(scores_NK, labels.cpu()))
    correct_EN, finite_EN = torch.cat(correct).view(draws, -1), torch.cat(finite).view(draws, -1)
    invalid = ~finite_EN.all(0)
    robust = (2 * correct_EN.sum(0) > draws) & ~invalid
    first = torch.cat(margins)[: len(y)]
    return Judgement(robust, ~robust & ~invalid, invalid, correct_EN & ~invalid, first)
