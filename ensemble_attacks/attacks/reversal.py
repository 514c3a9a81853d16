"""Implement front-end reversal: attack what lies behind a front end, and carry the perturbation back through it without a
gradient (the ``front_rev`` attack of Bosch Research's bcai_art, by the authors of arXiv:2402.17018).

It is meant for front ends that BPDA's identity does not stand in for: those far from the identity, or that change the
image's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchattacks.attack import Attack

from ensemble_attacks.attacks.apgd import APGD
from ensemble_attacks.attacks.composed import ComposedAttack
from ensemble_attacks.descent.balls import make_ball
from ensemble_attacks.descent.noise import sample_keys, start_noise
from ensemble_attacks.errors import PartError
from ensemble_attacks.models.ask import ask
from ensemble_attacks.models.parts import check_output, find_parts, not_called
from ensemble_attacks.norms import NORMS, UNIT, Box
from ensemble_attacks.scores import decided, per_sample
from ensemble_attacks.validation import check_count, check_norm, check_positive

REACH = 128.0  # the front end's outputs are attacked as images in [0, 1], which stand for [-REACH, REACH]
SHARES = 10  # of the perturbation that are tried: 1/10, 2/10, ..., 1


class Behind(nn.Module):
    """A module that does what a model does with the output of one of its parts.

    It takes values v (N, ...) in [0, 1], which stand for outputs ``REACH * (2 v - 1)``, and returns scores (N, K).

    Raises:
        PartError: Where there is no such part, or more than one.
    """

    def __init__(self, model: nn.Module, part: str) -> None:
        super().__init__()
        self.model = model
        names = [name for name, _ in find_parts(model, part)]
        if len(names) > 1:
            raise PartError(
                f"part: {part!r} is {', '.join(names)}: name one, or attack the members that hold them one by one"
            )
        self.name, self.part = names[0], model.get_submodule(names[0])
        self.image_shape: tuple[int, ...] = ()
        self.training = model.training

    def forward(self, v: Tensor) -> Tensor:
        with _forward_of(self.part, lambda *_, **__: REACH * (2 * v - 1)):
            return ask(self.model, v.new_zeros(len(v), *self.image_shape))

    @torch.no_grad()
    def seen(self, x: Tensor) -> Tensor:
        """Return the part's output for images (N, C, H, W), as values in [0, 1].

        Raises:
            PartError: Where the part is not called, or its outputs go beyond `REACH`.
        """
        kept: list[Tensor] = []
        handle = self.part.register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            ask(self.model, x)
        finally:
            handle.remove()
        if not kept:
            raise not_called([self.name])
        check_output(self.name, kept[0])
        if not kept[0].abs().max() < REACH:
            raise PartError(
                f"part: its outputs reach {kept[0].abs().max():g}, beyond {REACH:g}: name a part that is image-like"
            )
        self.image_shape = tuple(x.shape[1:])
        return (kept[0] / REACH + 1) / 2


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


class FrontEndReversal(ComposedAttack):
    r"""An attack on what lies behind a front end that is carried back to the image by the front end's mean amplification.

    The source is bcai_art's ``front_rev`` (arXiv:2402.17018). The front end amplifies random perturbations ``s`` times. What
    lies behind is attacked from ``F(x)`` within ``s eps``; what is found is divided by ``s``, 1/10, 2/10, ... up to the
    whole of it is added to the image, and the first share that fools the model is kept. Each further round starts half a
    perturbation away, with half the radius. The front end is never differentiated. Success is decided by one forward pass.

    Arguments:
        model (nn.Module): images in [0, 1] -> scores (N, K).
        attack (callable): makes the attack on what lies behind. (Default: `APGD`)
        part (str): the front end, by name. Its output must have the image's channels; another height and width are resized.
            (Default: ``"frontend"``)
        norm (str): ``"Linf"`` or ``"L2"``. (Default: ``"Linf"``)
        eps (float): radius of the ball, in pixel units of [0, 1]. (Default: 8/255)
        rounds (int): number of rounds. (Default: 3)
        amplification (float): the ``s`` above; ``None``: measured on the images of every call, on which the result then
            depends. (Default: None)
        box (Box): the values that images can take. (Default: [0, 1])
        mask: must be None, as what is carried back goes everywhere. (Default: None)
        arguments: further arguments of ``attack``.

    Raises:
        PartError: Where there is no such part, more than one, or, in a call, one whose output is not image-like.

    Shape:
        - images: :math:`(N, C, H, W)`, floating point in [0, 1]
        - labels: :math:`(N)`, integer class indices
        - output: :math:`(N, C, H, W)`
    """

    def __init__(
        self,
        model: nn.Module,
        attack: Callable[..., Attack] = APGD,
        part: str = "frontend",
        norm: str = "Linf",
        eps: float = 8 / 255,
        rounds: int = 3,
        amplification: float | None = None,
        box: Box = UNIT,
        mask: Tensor | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__("FrontEndReversal", model)
        self.box, self.mask = box, mask  # its own: what lies behind the front end has others
        self.part, self.norm, self.eps, self.rounds, self.amplification = part, norm, eps, rounds, amplification
        self._check()
        self.inner = attack(Behind(self.model, part), norm=norm, eps=eps, **arguments)

    def _check(self) -> None:
        check_norm(self.norm)
        check_positive("eps", self.eps)
        if self.mask is not None:
            raise ValueError("FrontEndReversal knows no mask: what it carries back goes everywhere; use BPDAIdentity")
        check_count("rounds", self.rounds)
        if self.amplification is not None:
            check_positive("amplification", self.amplification)
        super()._check()

    def set_model(self, model: nn.Module) -> None:
        behind = Behind(model, self.part) if "inner" in vars(self) else None
        super().set_model(model)
        if behind is not None:
            self.inner.set_model(behind)

    def _attack(
        self, images: Tensor, labels: Tensor, targets: Tensor | None, num_classes: int, *args: Any, **options: Any
    ) -> Tensor:
        """Return adversarial images (N, C, H, W)."""
        self.inner._set_normalization_applied(None)  # what it sees are no images
        ball = make_ball(self.norm, images, self.eps, self.box)
        best, robust, start = images.clone(), self._right(images, labels), images
        own_eps = self.inner.eps
        amplification = self.amplification or self._amplification(images)
        for round_ in range(self.rounds):
            rows = torch.nonzero(robust).squeeze(-1)
            if not len(rows):
                break
            seen = self._seen(start[rows])
            largest = UNIT.diameter(self.norm, seen[0])
            self.inner.eps = min(amplification * self.eps / 2**round_ / (2 * REACH), largest)
            try:
                found = self.inner(seen, labels[rows]).to(seen)
            finally:
                self.inner.eps = own_eps
            step = self._as_image((found - seen).nan_to_num() * 2 * REACH / amplification, images)
            for share in range(1, SHARES + 1):
                trial = ball.select(rows).project(start[rows] + share / SHARES * step)
                fooled = robust[rows] & ~self._right(trial, labels[rows])
                best = best.index_copy(0, rows, torch.where(per_sample(fooled, trial), trial, best[rows]))
                robust = robust.index_copy(0, rows, robust[rows] & ~fooled)
            start = start.index_copy(0, rows, ball.select(rows).project(start[rows] + step / 2))
        return best

    @torch.no_grad()
    def _right(self, x: Tensor, labels: Tensor) -> Tensor:
        parts = zip(self._split(x), self._split(labels), strict=True)
        scores = [(self.get_logits(images), truth) for images, truth in parts]
        return torch.cat([(s.argmax(1) == truth) | ~decided(s) for s, truth in scores])

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.split(getattr(self, "batch_size", None) or len(values))

    def _seen(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner.model.seen(images) for images in self._split(self._as_taken(x))])

    def _amplification(self, x: Tensor) -> float:
        """Return ``E |F(x + d) - F(x)| / |d|`` over random ``d`` on the sphere, at least 1e-6."""
        norm = NORMS[self.norm]
        noise = start_noise(sample_keys(x, self.box), x, seed=getattr(self, "seed", 0), restart=0, norm=self.norm)
        delta = make_ball(self.norm, x, self.eps, self.box).start(noise) - x
        change = (self._seen(x + delta) - self._seen(x)) * 2 * REACH
        ratio = norm.size(change) / norm.size(delta).clamp_min(1e-12)
        return max(ratio.mean().item(), 1e-6)

    def _as_image(self, step: Tensor, like: Tensor) -> Tensor:
        if step.dim() != 4 or step.shape[1] != like.shape[1]:
            put_out = f"it puts out {tuple(step.shape[1:])} for images {tuple(like.shape[1:])}"
            raise PartError(f"part: {put_out}: name one that keeps the channels")
        if step.shape[-2:] == like.shape[-2:]:
            return step
        return F.interpolate(step, like.shape[-2:], mode="bilinear", align_corners=False)
