"""Run anybody's torchattacks ``Attack`` as if it had been written for this package: it sees the model through `Asked`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torchattacks.attack import Attack

from ensemble_attacks.attacks.careful import CarefulAttack
from ensemble_attacks.descent.balls import Ball, make_ball
from ensemble_attacks.errors import AttackFailedError, out_of_memory, reason
from ensemble_attacks.judge import outside
from ensemble_attacks.models.ask import Asked, as_module, classes_of, default_dtype, device_of
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.passes import uncounted
from ensemble_attacks.models.preserve import ordinary
from ensemble_attacks.norms import NORMS
from ensemble_attacks.scores import per_sample
from ensemble_attacks.validation import check_images, check_labels


def craft(
    attack: Attack,
    x: Tensor,
    y: Tensor,
    *,
    seed: int,
    batch_size: int,
    eps: float | None = None,
    norm: str = "Linf",
    checked: bool = False,
) -> Tensor:
    """Run anybody's attack, in batches, leaving all as it was, and return the images on the device of ``x``.

    The attacks of this package see to the batches and to leaving all as it was themselves. Others craft in float32; where
    ``eps`` is given, what rounding to the type of ``x`` carries out of the ball is put back (`rounded`).
    A model whose answers the caller has ``checked`` is only asked by the attack itself.

    Raises:
        TypeError, ValueError: Where images, labels or model cannot be attacked; nothing has been run.
        AttackFailedError: Where an attack of others ends with an error.
    """
    if isinstance(attack, CarefulAttack):
        return attack(x, y).to(x.device)
    model = as_module(attack.model)
    check_images(x)
    check_labels(y, x)
    place = device_of(model, x.device)  # of a function, other people's attacks do not find it
    with guarded(model, seed=seed, evaluate=False), _asking(attack):
        x, y = ordinary(x), ordinary(y).long()
        if not checked:
            with uncounted(model):
                classes_of(Asked(model), x[:2].float().to(place), y)
        images = torch.empty_like(x, dtype=torch.float32)
        with default_dtype(torch.float32), _told(attack):
            for rows in torch.arange(len(x)).split(batch_size):  # it may write into what it gets
                crafted = attack(x[rows].to(place, torch.float32, copy=True), y[rows].to(place, copy=True)).detach()
                if crafted.shape != x[rows].shape:
                    raise ValueError(f"it returned images of shape {tuple(crafted.shape)}, not {tuple(x[rows].shape)}")
                images[rows] = crafted.to(images)
        return images.to(x.dtype) if eps is None else rounded(x, images, eps=eps, norm=norm)


@contextmanager
def _told(attack: Attack) -> Iterator[None]:
    """Say which attack it was that raised within the context."""
    try:
        yield
    except (AssertionError, LookupError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise AttackFailedError(
            f"{attack.attack} of {type(attack).__module__} cannot attack this: {reason(error)}"
        ) from error


@contextmanager
def _asking(attack: Attack) -> Iterator[None]:
    """Let an attack, and those that it is made of, ask their models through `Asked` within the context."""
    parts = {id(part): part for part in (attack, *vars(attack).get("_attacks", {}).values())}
    held = [(vars(part), part.model) for part in parts.values() if not isinstance(part, CarefulAttack)]
    seen = {id(model): Asked(as_module(model)) for _, model in held}
    try:
        for attributes, model in held:
            attributes["model"] = seen[id(model)]
        yield
    finally:
        for attributes, model in held:
            attributes["model"] = model


def rounded(x: Tensor, images: Tensor, *, eps: float, norm: str) -> Tensor:
    """Return images that were crafted in float32 around ``x`` in its type, and within the ball and the box.

    What left the ball before it was rounded is not put back: to be seen.
    """
    if x.dtype == images.dtype or not len(x):
        return images
    left = outside(x.to(images), images, eps=eps, norm=norm)
    images = images.to(x.dtype)
    inside = make_ball(norm, x, eps).project(images) if norm in Ball.known else _shrunk(x, images, eps, norm)
    return torch.where(per_sample(left, x), images, inside)


def _shrunk(x: Tensor, images: Tensor, eps: float, norm: str) -> Tensor:
    """Return images drawn towards ``x`` until they lie in the ball, in the type that they have."""
    clean, inside = x.double(), images
    for scale in (1.0, 0.99, 0.9, 0.0):  # each rounding may step out again
        delta = images.double() - clean
        sizes = NORMS[norm].size(delta).clamp_min(eps)
        moved = (clean + delta * per_sample(scale * eps / sizes, x)).clamp(0, 1).to(x.dtype)
        far = NORMS[norm].size(inside.double() - clean) > eps
        inside = torch.where(per_sample(far, x), moved, inside)
    return inside
