"""Check what attacks on a model say: whether they behave as attacks on an honest model must."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ensemble_attacks.diagnostics.binarization import binarization
from ensemble_attacks.diagnostics.examination import STEPS, UNBOUNDED, Examination, share
from ensemble_attacks.diagnostics.findings import FLAG, NOTE, OK, Check, attempted, measure, measured
from ensemble_attacks.diagnostics.indicators import RADIUS, indicators
from ensemble_attacks.errors import out_of_memory
from ensemble_attacks.models.ask import ask
from ensemble_attacks.models.parts import straight_through
from ensemble_attacks.models.surrogates import Surrogate
from ensemble_attacks.norms import UNIT


def of_attacks(examined: Examination) -> Iterator[Check]:
    n = len(examined.x)
    clean = examined.accuracy(examined.x)
    step = examined.accuracy(examined.pgd(examined.model, 1, examined.eps, step_size=examined.eps))
    white = examined.accuracy(examined.pgd(examined.model, STEPS, examined.eps))
    longer = examined.accuracy(examined.pgd(examined.model, 2 * STEPS, examined.eps))
    noise = min(examined.accuracy(UNIT.clamp(examined.x + examined.eps * examined.noise(k).sign())) for k in range(3, 6))
    at_all = examined.accuracy(examined.pgd(examined.model, 2 * STEPS, UNBOUNDED))
    slack = max(0.05, 2 / n)
    next_ = examined.surrogate() or "apgd-t"
    said = "the single step fools more than twenty"
    yield measure("single_step", white - step, slack, said, next_, "[C19]")
    said = "random noise fools more than the gradient"
    yield measure("noise", white - noise, slack, said, "square", "[C19]")
    said = "so much robust accuracy is left where the ball holds every image"
    yield measure("unbounded", at_all, 0.1, said, next_, "[C19], [P22] I6")
    said = "twice the steps lower the robust accuracy by so much"
    yield measure("not_converged", white - longer, max(0.15, 3 / n), said, next_, "[C19]")
    if not examined.structure.random:
        other = examined.accuracy(examined.pgd(examined.model, STEPS, examined.eps, loss="margin"))
        said = "the margin of the scores, whatever their scale, fools so much more than their cross-entropy"
        yield measure("scale", white - other, max(0.15, 3 / n), said, next_, "[CH20] DLR")
    yield Check("clean", NOTE, clean, None, "accuracy on the clean images")
    yield Check("white_box", NOTE, longer, None, f"robust accuracy under {2 * STEPS} steps of PGD on the model itself")
    limits = min(white, longer), max(0.1, 3 / n)
    if examined.structure.members:
        yield from attempted("transfer_gap", _past_aggregation(examined, *limits))
    if examined.structure.frontend:
        yield from attempted("frontend_gap", _past_frontend(examined, *limits))


def _past_aggregation(examined: Examination, white: float, slack: float) -> Iterator[Check]:
    robust = examined.accuracy(examined.pgd(Surrogate(examined.model, "mean"), STEPS, examined.eps))
    said = "attacking the mean of the members' logits fools so much more than attacking the model"
    yield measure("transfer_gap", white - robust, slack, said, "crossmax-transfer", "arXiv:2411.14834")


def _past_frontend(examined: Examination, white: float, slack: float) -> Iterator[Check]:
    with straight_through(examined.model, "frontend"):
        images = examined.pgd(examined.model, STEPS, examined.eps)
    said = "attacking past the front end fools so much more than attacking through it"
    yield measure("frontend_gap", white - examined.accuracy(images), slack, said, "bpda", "arXiv:2402.17018")


def of_one_attack(examined: Examination) -> Iterator[Check]:
    """Yield checks of one attack, image by image: indicators of its failure, and whether it solves tasks that can be solved.

    I1 is ``zero_gradients``; I5, of attacks on another model than the target, is left to `indicators`.
    """
    with torch.no_grad():
        right = ask(examined.original, examined.x).argmax(1) == examined.y
    x, y = examined.x[right][: examined.alone], examined.y[right][: examined.alone]
    if not len(x):
        yield Check("attack", NOTE, 0.0, None, "no image is classified rightly: no attack is looked into")
        return
    next_ = examined.surrogate() or "apgd-t"
    radius = min(RADIUS, 2 * examined.eps)
    try:
        found = indicators(examined.attack, examined.model, x, y, eps=examined.eps, seed=examined.seed, radius=radius)
    except Exception as error:  # of somebody else's attack
        if out_of_memory(error):
            raise
        yield Check("attack", FLAG, 0.0, None, f"the attack ends with {type(error).__name__}: {error}", next_)
        return
    said = f"median relative change of the margin within {radius / 2:.3f}: the loss is noise"
    yield measure("unstable_predictions", found.unstable_predictions.median().item(), 0.1, said, next_, "[P22] I2")
    if not examined.structure.random:  # of a random model, one lucky draw is no success
        said = "of so many images an iterate was a success that the attack did not give back"
        yield measured("silent_success", found.silent_success, 0.0, said, "pgd", "[P22] I3")
        said = "of so many images the attack failed while its loss still moved"
        yield measured("incomplete_optimization", found.incomplete_optimization, 0.1, said, next_, "[P22] I4")
    said = "of so many images the attack fails without a bound"
    failed = found.unconstrained_attack_failure
    yield measured("unconstrained_attack_failure", failed, 0.1, said, next_, "[P22] I6")
    yield _binarization(examined, x, next_)


def _binarization(examined: Examination, x: Tensor, next_: str) -> Check:
    if examined.structure.random:
        return Check("binarization", NOTE, 0.0, None, "no binarization test of a random model", "", "[Z22]")
    try:
        tasks = binarization(
            lambda net: examined.attack(net, examined.eps),
            examined.twin,
            x,
            eps=examined.eps,
            seed=examined.seed,
            repeats=1,  # it is not random
        )
    except Exception as error:  # of a model without read-outs, or of an attack that wants more than two classes
        if out_of_memory(error):
            raise
        return Check("binarization", NOTE, 0.0, None, f"no binarization test: {error}", "", "[Z22]")
    if len(tasks.found) < 4:
        said = f"no binarization test: {tasks.skipped} of {len(x)} images make no binary task"
        return Check("binarization", NOTE, 0.0, None, said, "", "[Z22]")
    chance = share(tasks.by_chance)
    said = f"of {len(tasks.found)} binary tasks with a known adversarial example, so many are solved by the attack"
    if chance > 0.5:
        return Check("binarization", NOTE, tasks.score, None, f"{said}, but {chance:.2f} by chance", "", "[Z22]")
    return Check("binarization", OK if tasks.score >= 0.95 else FLAG, tasks.score, 0.95, said, next_, "[Z22]")
