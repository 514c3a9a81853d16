"""What every attack keeps at its door: order, targets, checks before work, whatever it is made of."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from ensemble_attacks import A3, APGD, CAA, MORA, BPDAIdentity, CrossMaxTransfer, Ensemble, FrontEndReversal, judge
from ensemble_attacks.evaluation.runner import check_arguments
from ensemble_attacks.evaluation.suite import Settings
from tests.helpers import make_ensemble

TARGETED = {
    "apgd": lambda model: APGD(model, eps=0.1, steps=4),
    "crossmax": lambda model: CrossMaxTransfer(model, attack=APGD, refine=APGD, refine_steps=3, eps=0.1, steps=4),
    "crossmax alone": lambda model: CrossMaxTransfer(model, attack=APGD, refine=None, eps=0.1, steps=4),
    "bpda": lambda model: BPDAIdentity(model, parts="4", eps=0.1, steps=4),
    "bpda of another": lambda model: BPDAIdentity(model, torchattacks.PGD, parts="4", eps=0.1, steps=4, random_start=False),
}
ALL = TARGETED | {
    "mora": lambda model: MORA(model, eps=0.1, steps=4),
    "a3": lambda model: A3(model, eps=0.1, n_restarts=1),
    "caa": lambda model: CAA(model, eps=0.1),
    "reversal": lambda model: FrontEndReversal(
        nn.Sequential(OrderedDict(frontend=nn.Identity(), backbone=model)).eval(), eps=0.1, steps=2
    ),
}


@pytest.mark.parametrize("name", TARGETED)
def test_random_targets_belong_to_the_image(name: str, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch[0][:8].float(), batch[1][:8]
    attack = TARGETED[name](make_ensemble(dtype=torch.float32))
    attack.set_mode_targeted_random(quiet=True)
    whole = attack(images, labels)
    torch.testing.assert_close(attack(images.flip(0), labels.flip(0)).flip(0), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(attack(images[2:4], labels[2:4]), whole[2:4], rtol=0, atol=1e-5)


class Answers(Ensemble):
    """Answers in a way of its own, whatever its members say."""

    def __init__(self, way: Any) -> None:
        super().__init__(list(make_ensemble(dtype=torch.float32).members))
        self.way, self.asked = way, 0
        self.eval()

    def forward(self, x: Tensor) -> Any:
        self.asked += 1
        return self.way(super().forward(x))


WAYS = {
    "a tuple": lambda scores: (scores, scores),
    "(N,)": lambda scores: scores[:, 0],
    "(N, 1)": lambda scores: scores[:, :1],
    "maps": lambda scores: scores[..., None, None].expand(-1, -1, 2, 2),
    "squeezed": lambda scores: scores.squeeze(0),
}


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ALL)
def test_answers_that_are_no_scores_are_told_at_once(
    name: str, way: str, targeted: bool, batch: tuple[Tensor, Tensor]
) -> None:
    model = Answers(WAYS[way])
    attack = ALL[name](model)
    if targeted and "targeted" not in attack.supported_mode:
        pytest.skip("is never targeted")
    if targeted:
        attack.set_mode_targeted_random(quiet=True)
    with pytest.raises((TypeError, ValueError), match="returns"):
        attack(batch[0][:8].float(), batch[1][:8])
    assert model.asked <= 4


@pytest.mark.parametrize("way", WAYS)
def test_the_judge_and_evaluate_tell_them_too(way: str, batch: tuple[Tensor, Tensor]) -> None:
    model, images, labels = Answers(WAYS[way]), batch[0][:8].float(), batch[1][:8]
    with pytest.raises((TypeError, ValueError), match="returns"):
        judge(model, images, labels, images, eps=0.1)
    with pytest.raises((TypeError, ValueError), match="returns"):
        check_arguments(model, images, labels, ["pgd"], Settings(0.1))
    assert model.asked <= 8


def test_kth_min_beyond_the_classes(batch: tuple[Tensor, Tensor]) -> None:
    attack = APGD(make_ensemble(dtype=torch.float32), eps=0.1, steps=2)
    attack.set_mode_targeted_least_likely(4, quiet=True)
    with pytest.raises(ValueError, match=r"kth_min is 4, but the model scores 4 classes.*use at most 3"):
        attack(batch[0].float(), batch[1])
    with pytest.raises(ValueError, match="kth_min must be at least 1"):
        attack.set_mode_targeted_least_likely(0, quiet=True)


@pytest.mark.parametrize(("norm", "eps", "remedy"), [("Linf", 8, "8/255"), ("L2", 128, "128/255")])
def test_a_ball_larger_than_the_box(norm: str, eps: float, remedy: str, batch: tuple[Tensor, Tensor]) -> None:
    images, labels, model = batch[0].float(), batch[1], make_ensemble(dtype=torch.float32)
    calls = [
        lambda: APGD(model, norm=norm, eps=eps)(images, labels),
        lambda: CrossMaxTransfer(model, norm=norm, eps=eps)(images, labels),
        lambda: judge(model, images, labels, images, norm=norm, eps=eps),
        lambda: check_arguments(model, images, labels, ["pgd"], Settings(eps, norm=norm)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"eps is {eps}.*did you mean eps = {remedy}"):
            call()


class Halving(nn.Module):
    """A front end that writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5).add_(0.25)


def test_bpda_of_a_part_that_works_in_place(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch[0].float(), batch[1]

    class Copying(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0.5 + 0.25

    found = [
        BPDAIdentity(
            nn.Sequential(OrderedDict(frontend=part, net=make_ensemble(dtype=torch.float32))).eval(), eps=0.1, steps=4
        )(images.clone(), labels)
        for part in (Halving(), Copying())
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ALL)
def test_tensors_made_in_inference_mode(name: str, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch[0][:6].float(), batch[1][:6]
    attack = ALL[name](make_ensemble(dtype=torch.float32))
    with torch.inference_mode():
        made = images.clone(), labels.clone()
    assert torch.equal(attack(*made), attack(images, labels))


def test_an_attack_leaves_the_callers_tensors(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch[0].float(), batch[1]
    before = images.clone(), labels.clone()
    attack = APGD(make_ensemble(dtype=torch.float32), eps=0.3, steps=4)
    attack.set_mode_targeted_by_function(lambda x, y: y.add_(1).remainder_(4) + 0 * x.zero_().long().sum(), quiet=True)
    attack(images, labels)
    attack.set_mode_targeted_by_label(quiet=True)
    attack(images, labels)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
