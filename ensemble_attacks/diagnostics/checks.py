"""The checks, by what they look at: structure, gradients, and how attacks behave.

Sources: [C19] Carlini et al., "On Evaluating Adversarial Robustness", arXiv:1902.06705. [A18] Athalye et al., "Obfuscated
Gradients Give a False Sense of Security", ICML 2018. [P22] Pintor et al., "Indicators of Attack Failure", NeurIPS 2022,
I1 to I6. [Z22] Zimmermann et al., "Increasing Confidence in Adversarial Robustness Evaluations", NeurIPS 2022. [CH20] Croce
& Hein, AutoAttack, ICML 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchattacks.attack import Attack

from ensemble_attacks.attacks.apgd import EOTAPGD
from ensemble_attacks.attacks.pgd import PGD
from ensemble_attacks.diagnostics.advice import attacks_for
from ensemble_attacks.diagnostics.binarization import binarization
from ensemble_attacks.diagnostics.findings import FLAG, NOTE, OK, Check, Diagnosis, _flag_if, _measure, _measured
from ensemble_attacks.diagnostics.indicators import RADIUS, indicators
from ensemble_attacks.errors import AggregateMismatchError
from ensemble_attacks.judge import judge
from ensemble_attacks.models.ask import ask, ask_members
from ensemble_attacks.models.ensembles import check_protocol
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.parts import premise, straight_through
from ensemble_attacks.models.passes import count_passes
from ensemble_attacks.models.preserve import in_training, private_random_state
from ensemble_attacks.models.structure import structure_of
from ensemble_attacks.models.surrogates import Surrogate
from ensemble_attacks.models.twins import prepare
from ensemble_attacks.norms import UNIT
from ensemble_attacks.scores import are_probabilities, decided, differ, margin
from ensemble_attacks.validation import (
    check_count,
    check_dtype,
    check_images,
    check_label_range,
    check_labels,
    check_module,
    check_positive,
)

STEPS = 20  # of the attacks below
FEWEST_DIAGNOSED = 4  # images
DRAWS = 10  # by which a random model is judged
EOT_ITER = 5
ALONE = 8  # images on which an attack is looked at one by one
UNBOUNDED = 0.5  # radius at which every image can become any other [C19]


def diagnose(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    seed: int = 0,
    attack: Callable[[nn.Module, float], Attack] | None = None,
) -> Diagnosis:
    """Look for reasons not to believe a robust accuracy in Linf.

    Args:
        model: images in [0, 1] -> scores (N, K).
        x, y: some images (N, C, H, W) and their classes (N,); 64 are enough.
        eps: radius of the ball, in pixel units of [0, 1].
        attack: whose failures are looked into, as in `indicators`. (Default: PGD, 50 steps; EOTAPGD for a random model)

    Raises:
        TypeError, ValueError: unusable arguments.
    """
    check_module(model)
    check_images(x, "x")
    check_labels(y, x, "y")
    check_positive("eps", eps)
    check_count("the number of images", len(x), at_least=FEWEST_DIAGNOSED)
    device = next(model.parameters(), x).device
    was_training = in_training(model)
    with guarded(model, seed=seed):
        x, y = x.detach().clone().to(device), y.clone().to(device).long()
        check_dtype(model, x, "x")
        with torch.no_grad():
            check_label_range(y, ask(model, x).shape[1], "y")
        examination = _Examination(model, x, y, eps, seed, attack)
        checks = [*examination.of_structure(was_training), *examination.of_gradients()]
        checks += [*examination.of_attacks(), *examination.of_one_attack()]
    attacks = attacks_for(examination.structure, [check for check in checks if check.verdict == FLAG])
    return Diagnosis(examination.structure, checks, attacks, examination.passes())


class _Examination:
    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        eps: float,
        seed: int,
        attack: Callable[[nn.Module, float], Attack] | None,
    ) -> None:
        self.original, self.x, self.y, self.eps, self.seed = model, x, y, eps, seed
        self.structure = structure_of(model, x, seed)
        self.counted = count_passes(prepare(model, x[:8]))
        self.model: Any = self.counted
        self.eot_iter = EOT_ITER if self.structure.random else None
        self.attack = attack or self._default_attack

    def passes(self) -> float:
        return (self.counted.forwards + self.counted.backwards) / len(self.x)

    # -- structure

    def of_structure(self, training: bool) -> Iterator[Check]:
        structure = self.structure
        yield Check(
            "members", NOTE, float(structure.members), None, "shows its members" if structure.members else "one model"
        )
        said = "parts called frontend stand before the classifier; their gradient may mislead"
        yield _flag_if(structure.frontend, "frontend", said, "bpda", "[A18] BPDA")
        said = "the members are put together otherwise than by mean probability, votes or mean logits"
        yield _flag_if(structure.own_aggregation, "aggregation", said, "crossmax-transfer", "arXiv:2411.14834")
        said = "members and aggregation predict otherwise than the model itself: attacks on them are misled"
        yield _flag_if(structure.members and self._contradicts_itself(), "protocol", said)
        said = "the same images get different scores: gradients and single predictions are draws"
        yield _flag_if(structure.random, "random", said, "eot-apgd", "[A18] EOT")
        said = "a forward pass sets the global random generator anew: its noise is the same in every call"
        yield _flag_if(self._reseeds(), "reseeds", said, "eot-apgd")
        said = "the same images and random state get different scores: it remembers what it has seen"
        yield _flag_if(self._remembers(), "stateful", said, "square")
        said = "was in training mode, where predictions depend on the batch: attacked and judged in eval mode"
        yield _flag_if(training, "training_mode", said)
        said = "an image's scores depend on the others in the batch"
        yield _flag_if(not structure.random and self._depends_on_batch(), "batch_dependence", said)
        with torch.no_grad():
            scores_NK = ask(self.original, self.x)
        probabilities = are_probabilities(scores_NK)
        yield _flag_if(
            probabilities, "probabilities", "the scores are probabilities, whose logarithm underflows", "", "[CH20]"
        )

    def _contradicts_itself(self) -> bool:
        try:
            check_protocol(self.original, self.x[:ALONE])
        except AggregateMismatchError:
            return True
        return False

    @torch.no_grad()
    def _reseeds(self) -> bool:
        states = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            ask(self.original, self.x[:2])
            states.append(torch.get_rng_state())
        return torch.equal(*states)

    @torch.no_grad()
    def _remembers(self) -> bool:
        scores = []
        for _ in range(4):
            with private_random_state(self.seed, self.original):
                scores.append(ask(self.original, self.x))
        return any(differ(other, scores[0]) for other in scores[1:])

    @torch.no_grad()
    def _depends_on_batch(self) -> bool:
        half = len(self.x) // 2
        return differ(ask(self.original, self.x)[:half], ask(self.original, self.x[:half]))

    # -- gradients

    def of_gradients(self) -> Iterator[Check]:
        gradient = self._gradient(self.model, self.x)
        zero = 1.0 if gradient is None else _share(_norms(gradient) == 0)
        said = "of so many images the gradient of the margin is zero or unavailable"
        yield _measure("zero_gradients", zero, 0.02, said, self._surrogate() or "square", "[P22] I1")
        if gradient is None:
            return
        noisy = UNIT.clamp(self.x + self.eps * self._noise(1))
        with torch.no_grad():
            finite = torch.stack([decided(ask(self.model, images)) for images in (self.x, noisy)])
        broken = _share(~finite.all(0) | ~torch.isfinite(gradient).flatten(1).all(1))
        yield _measure("non_finite", broken, 0.0, "of so many images scores or gradients are NaN or infinite", "", "[P22]")
        saturated = self._gradient(self.model, self.x, F.cross_entropy)
        said = "of so many images the gradient of the cross-entropy vanishes while that of the margin does not"
        gone = 0.0 if saturated is None else _share((_norms(saturated) < 1e-12) & (_norms(gradient) > 0))
        yield _measure("saturation", gone, 0.5, said, "mora" if self.structure.members else "apgd-t", "[CH20] DLR")
        yield from self._roughness(gradient)
        if self.structure.members:
            yield from self._of_members()
        if self.structure.random:
            again = self._gradient(self.model, self.x)
            if again is not None:
                said = "mean cosine between the gradients of two draws"
                yield Check("draws_agree", NOTE, _cosine(gradient, again).mean().item(), None, said, "eot-apgd", "[A18] EOT")
        if self.structure.frontend:
            figures: Any = premise(self.original, "frontend", self.x, self.y)
            said = "mean cosine between the gradients with the front end and past it"
            yield Check("frontend_agrees", NOTE, figures["gradient_cosine"], None, said, "bpda", "arXiv:2402.17018")

    def _roughness(self, gradient: Tensor) -> Iterator[Check]:
        if self.structure.random:
            return
        step = self.eps / 20 * self._noise(2)
        inside = (self.x + step - 0.5).abs() <= 0.5
        beside = self._gradient(self.model, torch.where(inside, self.x + step, self.x - step))
        assert beside is not None
        alive = (_norms(gradient) > 0) & (_norms(beside) > 0)
        agree = _cosine(gradient, beside)[alive].median().item() if alive.any() else 1.0
        said = "median cosine between the gradient at an image and at eps / 20 beside it: the surface is shattered"
        verdict = FLAG if agree < 0.3 else OK
        yield Check("shattered", verdict, agree, 0.3, said, self._surrogate() or "square", "[A18] shattered gradients")

    def _of_members(self) -> Iterator[Check]:
        images = self.x.detach().clone().requires_grad_()
        with torch.enable_grad():
            logits_MNK = ask_members(self.model, images)
        gradients = []
        for logits_NK in logits_MNK:
            own = None
            if logits_NK.requires_grad:
                (own,) = torch.autograd.grad(margin(logits_NK, self.y).sum(), images, retain_graph=True, allow_unused=True)
            gradients.append(torch.zeros_like(images) if own is None else own.detach())
        silent = float(sum(bool((_norms(own) == 0).all()) for own in gradients))
        yield _measure("detached_member", silent, 0.0, "members give no gradient at all", "crossmax-transfer", "[P22]")
        pairs = [_cosine(a, b).mean().item() for i, a in enumerate(gradients) for b in gradients[:i]]
        if pairs:
            said = "mean cosine between the members' gradients"
            yield Check("members_agree", NOTE, sum(pairs) / len(pairs), None, said, "mora", "MORA, NeurIPS 2022")

    # -- attacks

    def of_attacks(self) -> Iterator[Check]:
        n = len(self.x)
        clean = self._accuracy(self.x)
        step = self._accuracy(self._pgd(self.model, 1, self.eps, step_size=self.eps))
        white = self._accuracy(self._pgd(self.model, STEPS, self.eps))
        longer = self._accuracy(self._pgd(self.model, 2 * STEPS, self.eps))
        noise = min(self._accuracy(UNIT.clamp(self.x + self.eps * self._noise(k).sign())) for k in range(3, 6))
        at_all = self._accuracy(self._pgd(self.model, 2 * STEPS, UNBOUNDED))
        slack = max(0.05, 2 / n)
        next_ = self._surrogate() or "apgd-t"
        said = "the single step fools more than twenty"
        yield _measure("single_step", white - step, slack, said, next_, "[C19]")
        said = "random noise fools more than the gradient"
        yield _measure("noise", white - noise, slack, said, "square", "[C19]")
        said = "so much robust accuracy is left where the ball holds every image"
        yield _measure("unbounded", at_all, 0.1, said, next_, "[C19], [P22] I6")
        said = "twice the steps lower the robust accuracy by so much"
        yield _measure("not_converged", white - longer, max(0.15, 3 / n), said, next_, "[C19]")
        if not self.structure.random:
            other = self._accuracy(self._pgd(self.model, STEPS, self.eps, loss="margin"))
            said = "the margin of the scores, whatever their scale, fools so much more than their cross-entropy"
            yield _measure("scale", white - other, max(0.15, 3 / n), said, next_, "[CH20] DLR")
        yield Check("clean", NOTE, clean, None, "accuracy on the clean images")
        yield Check("white_box", NOTE, longer, None, f"robust accuracy under {2 * STEPS} steps of PGD on the model itself")
        yield from self._transfer(min(white, longer), max(0.1, 3 / n))

    def _transfer(self, white: float, slack: float) -> Iterator[Check]:
        if self.structure.members:
            robust = self._accuracy(self._pgd(Surrogate(self.model, "mean"), STEPS, self.eps))
            said = "attacking the mean of the members' logits fools so much more than attacking the model"
            yield _measure("transfer_gap", white - robust, slack, said, "crossmax-transfer", "arXiv:2411.14834")
        if self.structure.frontend:
            with straight_through(self.model, "frontend"):
                images = self._pgd(self.model, STEPS, self.eps)
            said = "attacking past the front end fools so much more than attacking through it"
            yield _measure("frontend_gap", white - self._accuracy(images), slack, said, "bpda", "arXiv:2402.17018")

    def of_one_attack(self) -> Iterator[Check]:
        """An attack, image by image: the indicators of its failure, and whether it solves tasks that can be solved.

        I1 is ``zero_gradients``; I5, of attacks on another model than the target, is left to `indicators`.
        """
        with torch.no_grad():
            right = ask(self.original, self.x).argmax(1) == self.y
        x, y = self.x[right][:ALONE], self.y[right][:ALONE]
        if not len(x):
            yield Check("attack", NOTE, 0.0, None, "no image is classified rightly: no attack is looked into")
            return
        next_ = self._surrogate() or "apgd-t"
        radius = min(RADIUS, 2 * self.eps)
        try:
            found = indicators(self.attack, self.model, x, y, eps=self.eps, seed=self.seed, radius=radius)
        except Exception as error:  # of somebody else's attack
            yield Check("attack", FLAG, 0.0, None, f"the attack ends with {type(error).__name__}: {error}", next_)
            return
        said = f"median relative change of the margin within {radius / 2:.3f}: the loss is noise"
        yield _measure("unstable_predictions", found.unstable_predictions.median().item(), 0.1, said, next_, "[P22] I2")
        if not self.structure.random:  # of a random model, one lucky draw is no success
            said = "of so many images an iterate was a success that the attack did not give back"
            yield _measured("silent_success", found.silent_success, 0.0, said, "pgd", "[P22] I3")
            said = "of so many images the attack failed while its loss still moved"
            yield _measured("incomplete_optimization", found.incomplete_optimization, 0.1, said, next_, "[P22] I4")
        said = "of so many images the attack fails without a bound"
        failed = found.unconstrained_attack_failure
        yield _measured("unconstrained_attack_failure", failed, 0.1, said, next_, "[P22] I6")
        yield self._binarization(x, next_)

    def _binarization(self, x: Tensor, next_: str) -> Check:
        if self.structure.random:
            return Check("binarization", NOTE, 0.0, None, "no binarization test of a random model", "", "[Z22]")
        try:
            tasks = binarization(lambda net: self.attack(net, self.eps), self.original, x, eps=self.eps, seed=self.seed)
        except Exception as error:  # of a model without read-outs, or of an attack that wants more than two classes
            return Check("binarization", NOTE, 0.0, None, f"no binarization test: {error}", "", "[Z22]")
        if len(tasks.found) < 4:
            said = f"no binarization test: {tasks.skipped} of {len(x)} images make no binary task"
            return Check("binarization", NOTE, 0.0, None, said, "", "[Z22]")
        chance = _share(tasks.by_chance)
        said = f"of {len(tasks.found)} binary tasks with a known adversarial example, so many are solved by the attack"
        if chance > 0.5:
            return Check("binarization", NOTE, tasks.score, None, f"{said}, but {chance:.2f} by chance", "", "[Z22]")
        return Check("binarization", OK if tasks.score >= 0.95 else FLAG, tasks.score, 0.95, said, next_, "[Z22]")

    # -- tools

    def _default_attack(self, model: nn.Module, eps: float) -> Attack:
        if self.eot_iter:
            return EOTAPGD(model, eps=eps, steps=STEPS, seed=self.seed, eot_iter=self.eot_iter)
        return PGD(model, eps=eps, steps=50, n_restarts=1, seed=self.seed)

    def _pgd(self, model: nn.Module, steps: int, eps: float, step_size: float | None = None, loss: str = "ce") -> Tensor:
        if self._gradient(model, self.x) is None:
            return self.x
        if step_size is None:
            arguments: dict[str, Any] = dict(eps=eps, steps=steps, seed=self.seed)
            if self.eot_iter:
                return EOTAPGD(model, eot_iter=self.eot_iter, **arguments)(self.x, self.y)
            return PGD(model, n_restarts=1, loss=loss, **arguments)(self.x, self.y)
        gradient = self._gradient(model, self.x, F.cross_entropy)
        assert gradient is not None
        return UNIT.clamp(self.x + step_size * gradient.nan_to_num().sign())

    def _accuracy(self, images: Tensor) -> float:
        draws = DRAWS if self.structure.random else 1
        return judge(self.original, self.x, self.y, images, eps=1.0, draws=draws).accuracy

    def _gradient(self, model: nn.Module, x: Tensor, loss: Any = None) -> Tensor | None:
        """Of the margin, or of another loss, at images; ``None`` where there is none."""
        images = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            try:
                scores_NK = ask(model, images)
            except RuntimeError:  # of an operation that has no gradient, such as numpy's
                return None
            if not scores_NK.requires_grad:
                return None
            value = -margin(scores_NK, self.y).sum() if loss is None else loss(scores_NK, self.y, reduction="sum")
            (gradient,) = torch.autograd.grad(value, images, allow_unused=True)
        return None if gradient is None else gradient.detach()

    def _noise(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1000 + seed)
        return (2 * torch.rand(self.x.shape, generator=generator, device="cpu") - 1).to(self.x)

    def _surrogate(self) -> str:
        """The attack on a stand-in that the structure allows, if any."""
        if self.structure.frontend:
            return "bpda"
        return "crossmax-transfer" if self.structure.members else ""


def _norms(gradient: Tensor) -> Tensor:
    return gradient.flatten(1).norm(dim=1)


def _share(found: Tensor) -> float:
    return found.double().mean().item()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.flatten(1), b.flatten(1))
