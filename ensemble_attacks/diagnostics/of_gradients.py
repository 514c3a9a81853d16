"""Check what a model's gradients say: whether they are there, finite and smooth, and whether its members agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ensemble_attacks.diagnostics.examination import Examination, cosine, lengths, share
from ensemble_attacks.diagnostics.findings import FLAG, NOTE, OK, Check, attempted, measure
from ensemble_attacks.models.ask import ask, ask_members
from ensemble_attacks.models.parts import premise
from ensemble_attacks.norms import UNIT
from ensemble_attacks.scores import decided, margin


def of_gradients(examined: Examination) -> Iterator[Check]:
    gradient = examined.gradient(examined.model, examined.x)
    zero = 1.0 if gradient is None else share(lengths(gradient) == 0)
    said = "of so many images the gradient of the margin is zero or unavailable"
    yield measure("zero_gradients", zero, 0.02, said, examined.surrogate() or "square", "[P22] I1")
    if gradient is None:
        return
    noisy = UNIT.clamp(examined.x + examined.eps * examined.noise(1))
    with torch.no_grad():
        finite = torch.stack([decided(ask(examined.model, images)) for images in (examined.x, noisy)])
    broken = share(~finite.all(0) | ~torch.isfinite(gradient).flatten(1).all(1))
    yield measure("non_finite", broken, 0.0, "of so many images scores or gradients are NaN or infinite", "", "[P22]")
    saturated = examined.gradient(examined.model, examined.x, F.cross_entropy)
    said = "of so many images the gradient of the cross-entropy vanishes while that of the margin does not"
    gone = 0.0 if saturated is None else share((lengths(saturated) < 1e-12) & (lengths(gradient) > 0))
    yield measure("saturation", gone, 0.5, said, "mora" if examined.structure.members else "apgd-t", "[CH20] DLR")
    yield from attempted("shattered", _roughness(examined, gradient))
    if examined.structure.members:
        yield from attempted("members_agree", _of_members(examined))
    if examined.structure.random:
        again = examined.gradient(examined.model, examined.x)
        if again is not None:
            said = "mean cosine between the gradients of two draws"
            yield Check("draws_agree", NOTE, cosine(gradient, again).mean().item(), None, said, "eot-apgd", "[A18] EOT")
    if examined.structure.frontend:
        yield from attempted("frontend_agrees", _of_frontend(examined))


def _of_frontend(examined: Examination) -> Iterator[Check]:
    figures: Any = premise(examined.original, "frontend", examined.x, examined.y)
    said = "mean cosine between the gradients with the front end and past it"
    yield Check("frontend_agrees", NOTE, figures["gradient_cosine"], None, said, "bpda", "arXiv:2402.17018")


def _roughness(examined: Examination, gradient: Tensor) -> Iterator[Check]:
    if examined.structure.random:
        return
    step = examined.eps / 20 * examined.noise(2)
    inside = (examined.x + step - 0.5).abs() <= 0.5
    beside = examined.gradient(examined.model, torch.where(inside, examined.x + step, examined.x - step))
    assert beside is not None
    alive = (lengths(gradient) > 0) & (lengths(beside) > 0)
    agree = cosine(gradient, beside)[alive].median().item() if alive.any() else 1.0
    said = "median cosine between the gradient at an image and at eps / 20 beside it: the surface is shattered"
    verdict = FLAG if agree < 0.3 else OK
    yield Check("shattered", verdict, agree, 0.3, said, examined.surrogate() or "square", "[A18] shattered gradients")


def _of_members(examined: Examination) -> Iterator[Check]:
    images = examined.x.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits_MNK = ask_members(examined.model, images)
    gradients = []
    for logits_NK in logits_MNK:
        own = None
        if logits_NK.requires_grad:
            (own,) = torch.autograd.grad(margin(logits_NK, examined.y).sum(), images, retain_graph=True, allow_unused=True)
        gradients.append(torch.zeros_like(images) if own is None else own.detach())
    silent = float(sum(bool((lengths(own) == 0).all()) for own in gradients))
    yield measure("detached_member", silent, 0.0, "members give no gradient at all", "crossmax-transfer", "[P22]")
    pairs = [cosine(a, b).mean().item() for i, a in enumerate(gradients) for b in gradients[:i]]
    if pairs:
        said = "mean cosine between the members' gradients"
        yield Check("members_agree", NOTE, sum(pairs) / len(pairs), None, said, "mora", "MORA, NeurIPS 2022")
