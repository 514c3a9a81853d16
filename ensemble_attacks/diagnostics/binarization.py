"""Run the binarization test of [Z22], which asks whether an attack finds an adversarial example that is known to be there.

[Z22] Zimmermann et al., "Increasing Confidence in Adversarial Robustness Evaluations", NeurIPS 2022, arXiv:2206.13991. In an
ensemble, every member's read-out is made binary, and the aggregation is left in place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from ensemble_attacks.attacks.foreign import craft
from ensemble_attacks.judge import judge, or_clean
from ensemble_attacks.models.ask import as_module, ask, beside
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.norms import UNIT
from ensemble_attacks.validation import check_count, check_images, check_positive

INNER = 50  # points around the image, of class 0
ETA = 0.95  # of eps: how far they may lie
CLOSENESS = 0.999  # of the way from the inner points to the boundary point, where the read-outs divide
RIDGE = 1e-3
LOGIT = 10.0  # of the image's class, where the image is
REPEATS = 3  # predictions of every point
RANDOM = 200  # points tried by the random attack


@dataclass(frozen=True, eq=False)
class Binarization:
    """A record of the test's results, by image that could be made a task, (N,).

    Attributes:
        found: (N,) bool: whether the attack succeeds, which it should on all; with a share below 0.95 it is too weak for the
            model [Z22].
        by_chance: (N,) bool: whether one of 200 random points succeeds, too; where most do, the task is too easy to tell.
        skipped: the number of images that could not be made a task: the read-outs cannot divide the points, or a random
            model does so only at times.
    """

    found: Tensor
    by_chance: Tensor
    skipped: int

    @property
    def score(self) -> float:
        """Return the share of the tasks that the attack solves, in [0, 1]; NaN without any."""
        return self.found.double().mean().item()


def binarization(
    attack: Callable[[nn.Module], Attack], model: nn.Module, x: Tensor, *, eps: float, seed: int = 0, repeats: int = REPEATS
) -> Binarization:
    """Test an attack on binary tasks made of a model ([Z22]).

    Args:
        attack: makes a torchattacks ``Attack`` in Linf: ``lambda net: PGD(net, eps=0.03)``.
        model: images in [0, 1] -> scores (N, K). Its linear layers with K outputs are the read-outs.
        x: images (N, C, H, W); ten or so are enough.
        eps: radius of the ball, in pixel units of [0, 1].
        seed: the seed of the random points, and of all randomness while the attack runs.
        repeats: predictions of every point that a task is made of, by which a random model gives itself away; 1 is enough
            for a model that is known not to be random.

    Returns:
        The tasks that the attack solves, and those that chance does.

    Raises:
        TypeError, ValueError: Where arguments are unusable, or a model has no linear read-outs or an aggregation that wants
            K classes.

    >>> from ensemble_attacks import PGD
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    >>> binarization(lambda net: PGD(net, eps=0.1), net, torch.rand(4, 1, 8, 8), eps=0.1).score
    1.0
    """
    model = as_module(model)
    check_images(x, "x")
    check_positive("eps", eps)
    check_count("the number of images", len(x))
    check_count("repeats", repeats)
    with guarded(model, seed=seed, evaluate=False):
        x = beside(model, x.detach().clone())
        binary = _Binary(model, x[:1])
        generator = torch.Generator().manual_seed(seed)
        found, by_chance = [], []
        for image in x.split(1):
            if not binary.fit(image, eps, generator, repeats):
                continue
            y = torch.zeros(1, dtype=torch.long, device=x.device)
            images = craft(attack(binary.model), image, y, seed=seed, batch_size=1, eps=eps)
            found.append(bool(judge(binary.model, image, y, or_clean(image, images, eps=eps), eps=eps).fooled))
            by_chance.append(bool((binary.predict(_boundary(image, eps, RANDOM, generator)) == 1).any()))
    return Binarization(torch.tensor(found), torch.tensor(by_chance), len(x) - len(found))


def _uniform(image: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return random numbers (count, C, H, W) in [-1, 1]."""
    return (2 * torch.rand((count, *image.shape[1:]), generator=generator, device="cpu") - 1).to(image)


def _boundary(image: Tensor, eps: float, count: int, generator: torch.Generator) -> Tensor:
    """Return random points, each with a pixel on the boundary of the ball.

    It is the one that moves the most, and it moves away from the nearer edge of the box.
    """
    directions = _uniform(image, count, generator)
    furthest = directions.flatten(1).abs().argmax(1, keepdim=True)
    inwards = torch.where(image.flatten(1).expand(count, -1).gather(1, furthest) > 0.5, -1.0, 1.0).to(image)
    directions = directions.flatten(1).scatter(1, furthest, inwards).view_as(directions)
    return UNIT.clamp(image + eps * directions)


class _Binary:
    """A copy of a model whose read-outs are made anew for every image.

    Raises:
        ValueError: Where the model cannot be copied, has no linear read-outs, or cannot do with binary ones.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        try:
            self.model: Any = copy.deepcopy(model).eval().requires_grad_(False)
        except Exception as error:  # not everything that a model may hold can be copied
            raise ValueError(f"model {type(model).__name__} cannot be copied: {error}") from error
        with torch.no_grad():
            classes = ask(self.model, x).shape[1]
        linear = {name: net for name, net in self.model.named_modules() if isinstance(net, nn.Linear)}
        self.heads = {name: net for name, net in linear.items() if net.out_features == classes}
        if not self.heads:
            raise ValueError(f"model {type(model).__name__} has no linear layer with {classes} outputs to make binary")
        for name, net in self.heads.items():
            parent, _, own = name.rpartition(".")
            self.heads[name] = head = nn.Linear(net.in_features, 2).to(net.weight).requires_grad_(False)
            setattr(self.model.get_submodule(parent), own, head)
        try:
            with torch.no_grad():
                shape = tuple(ask(self.model, x).shape)
        except Exception as error:  # what comes after the read-outs may want K of them, and says so in its own way
            raise ValueError(f"model {type(model).__name__} cannot do with binary read-outs: {error}") from error
        if shape != (1, 2):
            raise ValueError(
                f"model {type(model).__name__} with binary read-outs returns scores of shape {shape}, not (1, 2)"
            )

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        return ask(self.model, images).argmax(1)

    @torch.no_grad()
    def fit(self, image: Tensor, eps: float, generator: torch.Generator, repeats: int) -> bool:
        """Fit read-outs that divide the image and inner points (class 0) from one boundary point (class 1).

        Tell whether there are any that do.
        """
        inner = UNIT.clamp(image + ETA * eps * _uniform(image, INNER, generator))
        points = torch.cat([image, inner, _boundary(image, eps, 1, generator)])
        for name, features in self._features(points).items():
            if features.dim() != 2 or len(features) != len(points):
                return False
            weight, bias = _divide(features.double())
            head = self.heads[name]
            head.weight.copy_(torch.stack([torch.zeros_like(weight), weight]))
            head.bias.copy_(torch.stack([torch.zeros_like(bias), bias]))
        predicted = torch.stack([self.predict(points) for _ in range(repeats)])  # a random model gives itself away
        return bool((predicted[:, -1] == 1).all()) and not predicted[:, :-1].any()

    def _features(self, points: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def note(name: str) -> Callable[..., None]:
            return lambda module, inputs: found.__setitem__(name, inputs[0])

        hooks = [head.register_forward_pre_hook(note(name)) for name, head in self.heads.items()]
        try:
            ask(self.model, points)
        finally:
            for hook in hooks:
                hook.remove()
        return found


def _divide(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return Fisher's discriminant (D,) and bias between all points but the last, and the last, close to it."""
    inner, outer = features_ND[:-1], features_ND[-1]
    centred = inner - inner.mean(0)
    covariance = centred.T @ centred / len(inner)
    ridge = RIDGE * covariance.diagonal().mean().clamp_min(1e-12) * torch.eye(len(covariance)).to(covariance)
    weight = torch.linalg.solve(covariance + ridge, outer - inner.mean(0))
    along, end = inner @ weight, outer @ weight
    threshold = along.max() + CLOSENESS * (end - along.max())
    scale = LOGIT / (threshold - along[0]).abs().clamp_min(1e-12)
    return scale * weight, -scale * threshold
