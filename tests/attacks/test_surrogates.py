"""Attacks through a stand-in for the gradient: BPDA with the identity, CrossMax disabled, and other surrogates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from defenses import load_model
from defenses.crossmax import CrossMax, crossmax
from ensemble_attacks import (
    A3,
    APGD,
    EOTAPGD,
    LAFEAT,
    MORA,
    PGD,
    BPDAIdentity,
    CrossMaxTransfer,
    Ensemble,
    FrontEndReversal,
    Surrogate,
    ZeroOrder,
    judge,
)
from ensemble_attacks.descent.stages import Trace
from ensemble_attacks.errors import NotAnEnsembleError, PartError
from ensemble_attacks.models.parts import premise, straight_through
from tests.helpers import make_ensemble, make_member, slow_but

EPS = 0.1


class Shattering(nn.Module):
    """Nearly the identity, with a gradient that says nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 50).round() / 50


class Guarded(nn.Module):
    def __init__(self, seed: int = 0, frontend: nn.Module | None = None) -> None:
        super().__init__()
        self.frontend = frontend or Shattering()
        self.backbone = make_member(4, seed).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(self.frontend(x))


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model(x).argmax(1) == y).double().mean().item()


@pytest.fixture
def guarded(batch: tuple[Tensor, Tensor]) -> tuple[Guarded, Tensor, Tensor]:
    model = Guarded().eval()
    return model, batch[0], model(batch[0]).argmax(1)


@pytest.mark.parametrize("attack", [APGD, PGD, torchattacks.PGD], ids=["apgd", "pgd", "torchattacks-pgd"])
def test_bpda_takes_the_mask_off(attack: type, guarded: tuple[Guarded, Tensor, Tensor]) -> None:
    model, x, y = guarded
    direct = attack(model, eps=EPS, steps=10)(x, y)
    bpda = BPDAIdentity(model, attack=attack, eps=EPS, steps=10)
    adversarial = bpda(x, y)
    assert accuracy(model, adversarial, y) < accuracy(model, direct, y) - 0.2
    judge(model, x, y, adversarial, eps=EPS)
    assert bpda.premise["frontend"]["largest"] <= 0.01 + 1e-9
    assert bpda.premise["gradient_cosine"] == 0


def test_the_gradient_is_that_of_the_model_without_its_part(guarded: tuple[Guarded, Tensor, Tensor]) -> None:
    model, x, _ = guarded
    x = Shattering()(x).requires_grad_()  # where the front end is the identity, so is everything behind it
    (expected,) = torch.autograd.grad(model.backbone(x).logsumexp(1).sum(), x)
    with straight_through(model, "frontend"):
        scores = model(x)
    (found,) = torch.autograd.grad(scores.logsumexp(1).sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(scores, model(x))


def test_parts_are_put_back_after_an_exception(guarded: tuple[Guarded, Tensor, Tensor]) -> None:
    model, x, y = guarded

    def failing(target: nn.Module, **arguments: object) -> APGD:
        attack = APGD(target)
        attack.forward = lambda *args: 1 / 0  # type: ignore[assignment]
        return attack

    with pytest.raises(ZeroDivisionError):
        BPDAIdentity(model, attack=failing)(x, y)
    assert not any(module._forward_hooks for module in model.modules())


def test_parts_that_do_not_exist_or_fit() -> None:
    model = Guarded().eval()
    with pytest.raises(PartError, match=r"'front' is no part of Guarded: choose from frontend, backbone, backbone\.0"):
        BPDAIdentity(model, parts="front")
    with pytest.raises(PartError, match="given Linear is no part"):
        BPDAIdentity(model, parts=[nn.Linear(2, 2)])
    with pytest.raises(PartError, match="parts is empty"):
        BPDAIdentity(model, parts=[])
    x = torch.rand(4, 3, 6, 6, dtype=torch.float64)
    with pytest.raises(PartError, match=r"'backbone\.0' turns \(4, 3, 6, 6\) into \(4, 8, 6, 6\)"):
        BPDAIdentity(model, parts="backbone.0")(x, torch.zeros(4, dtype=torch.long))
    assert not any(module._forward_hooks for module in model.modules())


class Cutting(Shattering):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Called(Guarded):
    """A guarded model that calls its front end so."""

    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__(frontend=Cutting())
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(self.how(self.frontend, x))


def called(how: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    return Called(how).eval().requires_grad_(False)


@pytest.mark.parametrize("how", [lambda part, x: part(x), lambda part, x: part(x=x)], ids=["by place", "by name"])
def test_bpda_passes_a_part_that_cuts_the_gradient(how: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> None:
    model = called(how)
    x, y = batch[0], model(batch[0]).argmax(1)
    bpda = BPDAIdentity(model, eps=EPS, steps=10)
    assert accuracy(model, bpda(x, y), y) < 0.6
    assert bpda.premise["gradient_cosine"] == 0
    assert accuracy(model, FrontEndReversal(model, eps=EPS, steps=10)(x, y), y) < 0.6


def test_a_part_that_is_not_called(batch: tuple[Tensor, Tensor]) -> None:
    model = called(lambda part, x: part.forward(x))
    for attack in (BPDAIdentity, FrontEndReversal):
        with pytest.raises(PartError, match="does not call 'frontend' as a module"):
            attack(model, eps=EPS)(*batch)


@pytest.mark.parametrize("attack", [BPDAIdentity, FrontEndReversal])
def test_arguments_are_checked_before_the_parts_are_looked_at(attack: type, batch: tuple[Tensor, Tensor]) -> None:
    made = attack(Guarded().eval(), eps=EPS)
    with pytest.raises(TypeError, match=r"images has dtype torch\.float32, the model torch\.float64"):
        made(batch[0].float(), batch[1])
    with pytest.raises(ValueError, match="one class index per image"):
        made(batch[0][0], batch[1])


def test_a_part_far_from_the_identity_is_warned_of(batch: tuple[Tensor, Tensor]) -> None:
    class Inverting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1 - x

    model = Guarded(frontend=Inverting()).eval()
    x, y = batch[0], model(batch[0]).argmax(1)
    with pytest.warns(UserWarning, match="'frontend' is far from the identity"):
        BPDAIdentity(model, eps=EPS, steps=2)(x, y)
    assert premise(model, "frontend", x, y)["gradient_cosine"] == pytest.approx(-1, abs=0.2)


def test_settings_of_the_attack_inside(guarded: tuple[Guarded, Tensor, Tensor]) -> None:
    model, x, y = guarded
    bpda = BPDAIdentity(model, eps=EPS, steps=5)
    first = bpda(x, y)
    bpda.seed = 1
    assert bpda.inner.seed == bpda.seed == 1
    assert not torch.equal(bpda(x, y), first)
    with pytest.raises(AttributeError, match="no attribute 'alpha'"):
        _ = bpda.alpha
    bpda.eps = -1
    with pytest.raises(ValueError, match="eps must be"):
        bpda(x, y)


def test_bpda_of_mora_on_guarded_members(batch: tuple[Tensor, Tensor]) -> None:
    model = Ensemble([Guarded(seed) for seed in range(3)], "voting").eval()
    x, y = batch[0], model(batch[0]).argmax(1)
    direct = MORA(model, eps=EPS, steps=10, betas=(0.5,))(x, y)
    adversarial = BPDAIdentity(model, attack=MORA, eps=EPS, steps=10, betas=(0.5,))(x, y)
    assert accuracy(model, adversarial, y) < accuracy(model, direct, y) - 0.2
    judge(model, x, y, adversarial, eps=EPS)


def test_crossmax_by_hand() -> None:
    logits = torch.tensor([[[3.0, 1.0, 0.0]], [[0.0, 5.0, 1.0]], [[2.0, 2.0, 4.0]]])
    # less the largest class: [0, -2, -3], [-5, 0, -4], [-2, -2, 0]; the largest predictor of every class is 0
    expected = {1: [0.0, 0.0, 0.0], 2: [-2.0, -2.0, -3.0], 3: [-5.0, -2.0, -4.0], None: [-2.0, -2.0, -3.0]}
    for k, scores in expected.items():
        assert crossmax(logits, k).tolist() == [scores]
    even = torch.randn(4, 5, 3)
    assert torch.equal(crossmax(even), crossmax(even, 3))  # the lower median
    for k in (0, 4):
        with pytest.raises(ValueError, match="k must be at"):
            CrossMax([make_member()] * 3, k=k)


@pytest.fixture(scope="module")
def masked(digits: tuple[Tensor, Tensor]) -> tuple[CrossMax, Tensor, Tensor]:
    """CrossMax of nine networks, on the digits that they get right."""
    names = ("standard", "adp", "gal")
    model = CrossMax([net for name in names for net in load_model(f"{name}_convnet_3", dataset="digits").members]).eval()
    right = model(digits[0]).argmax(1) == digits[1]
    return model, digits[0][right], digits[1][right]


@pytest.fixture(scope="module")
def directly(masked: tuple[CrossMax, Tensor, Tensor]) -> float:
    """The accuracy that PGD on CrossMax itself leaves."""
    model, x, y = masked
    return accuracy(model, PGD(model, eps=0.12, steps=20, n_restarts=1)(x, y), y)


@pytest.mark.parametrize("attack", slow_but([APGD, torchattacks.PGD], [APGD, EOTAPGD, MORA, torchattacks.PGD]))
def test_crossmax_transfer(attack: type, masked: tuple[CrossMax, Tensor, Tensor], directly: float) -> None:
    model, x, y = masked
    arguments: dict[str, Any] = {"eps": 0.12, "steps": 20} | ({"eot_iter": None} if attack is EOTAPGD else {})
    transfer = CrossMaxTransfer(model, attack=attack, refine=None, **arguments)(x, y)
    refine = partial(APGD, norm="Linf")
    refined = CrossMaxTransfer(model, attack=attack, refine=refine, refine_steps=20, **arguments)(x, y)
    assert accuracy(model, transfer, y) < directly - 0.05
    assert accuracy(model, refined, y) <= accuracy(model, transfer, y)
    for adversarial in (transfer, refined):
        judge(model, x, y, adversarial, eps=0.12)


def test_a_refinement_is_told_the_ball(masked: tuple[CrossMax, Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="PGDL2 does not say its norm, which the refinement needs"):
        CrossMaxTransfer(masked[0], attack=torchattacks.PGDL2, eps=0.3)
    attack = CrossMaxTransfer(masked[0], attack=torchattacks.PGDL2, refine=partial(APGD, norm="L2"), refine_steps=3, eps=0.3)
    model, x, y = masked
    judge(model, x, y, attack(x, y), eps=0.3, norm="L2")


def test_both_parts_aim_at_the_same_class(masked: tuple[CrossMax, Tensor, Tensor]) -> None:
    model, x, y = masked
    attack = CrossMaxTransfer(model, attack=APGD, refine=APGD, refine_steps=30, eps=0.3, steps=30)
    attack.set_mode_targeted_least_likely(quiet=True)
    aim = model(x).argmin(1)
    assert (model(attack(x, y)).argmax(1) == aim).float().mean() > 0.5
    assert attack.refine is not None
    assert attack.inner._target_map_function != attack.refine._target_map_function


def test_settings_are_those_of_both_parts(masked: tuple[CrossMax, Tensor, Tensor]) -> None:
    attack = CrossMaxTransfer(masked[0], attack=MORA, eps=0.2, batch_size=30)
    assert attack.refine is not None
    assert (attack.refine.eps, attack.refine.batch_size, attack.refine.eot_iter) == (0.2, 30, None)
    attack.eps = 0.1
    assert attack.refine.eps == attack.inner.eps == attack.eps == 0.1
    attack.trace = Trace()
    assert attack.refine.trace is None
    assert attack.trace is attack.inner.trace
    attack.set_model(make_ensemble())
    assert attack.inner.model.target is attack.refine.model is attack.model


def test_the_target_decides_on_success(masked: tuple[CrossMax, Tensor, Tensor]) -> None:
    """The attack on the surrogate goes on until the target is wrong, and costs one pass of the members for both."""
    model, x, y = masked
    surrogate = Surrogate(model)
    attack = APGD(surrogate, eps=0.12, steps=20)
    seen = attack.outputs(x)
    assert torch.equal(seen.scores_NK, model.member_logits(x).mean(0))
    assert seen.verdict_ENK is not None
    assert torch.equal(seen.verdict_ENK[0], model(x))
    assert torch.equal(surrogate(x), seen.scores_NK)
    fooled = model(attack(x, y)).argmax(1) != y
    assert fooled.any()


def test_any_model_can_be_the_surrogate(guarded: tuple[Guarded, Tensor, Tensor]) -> None:
    model, x, y = guarded
    adversarial = CrossMaxTransfer(model, attack=APGD, surrogate=model.backbone, refine=None, eps=EPS, steps=10)(x, y)
    assert accuracy(model, adversarial, y) < 0.8
    first = CrossMaxTransfer(make_ensemble(), attack=APGD, surrogate=lambda logits: logits[0], refine=None, eps=EPS, steps=3)
    assert first(x, y).shape == x.shape


def test_gradients_can_be_estimated(guarded: tuple[Guarded, Tensor, Tensor]) -> None:
    """On a front end that is flat nearly everywhere, differences over more than its steps see what gradients do not."""
    model, x, y = guarded
    x, y = x[:20], y[:20]
    direct = PGD(model, eps=EPS, steps=10, n_restarts=1)(x, y)
    blind = PGD(ZeroOrder(model, queries=100, sigma=0.02), eps=EPS, steps=10, n_restarts=1)(x, y)
    judge(model, x, y, blind, eps=EPS)
    assert accuracy(model, blind, y) < accuracy(model, direct, y) - 0.2
    linear = nn.Sequential(nn.Flatten(), nn.Linear(108, 4)).double()
    images = x.clone().requires_grad_()
    expected, found = (
        torch.autograd.grad(net(images)[:, 0].sum(), images)[0].flatten(1) for net in (linear, ZeroOrder(linear, 2000))
    )
    assert torch.cosine_similarity(expected, found).min() > 0.9
    with pytest.raises(ValueError, match="queries must be at least 1"):
        ZeroOrder(model, queries=0)


def test_lafeat_reads_the_probes(masked: tuple[CrossMax, Tensor, Tensor], directly: float) -> None:
    model, x, y = masked
    adversarial = LAFEAT(Surrogate(model), eps=0.12, steps=20, probes=(0, 3, 6))(x, y)
    assert accuracy(model, adversarial, y) < directly - 0.05
    with pytest.raises(ValueError, match="probes is empty"):
        LAFEAT(Ensemble([make_member()]))(torch.rand(2, 3, 6, 6), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"probes holds 9, but the model has 9 members \(0 to 8\)"):
        LAFEAT(model, probes=(9,))(x, y)


def test_surrogates_that_do_not_exist(guarded: tuple[Guarded, Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="unknown surrogate 'maen': did you mean 'mean'"):
        CrossMaxTransfer(make_ensemble(), surrogate="maen")
    with pytest.raises(NotAnEnsembleError, match="Guarded has no member_logits"):
        CrossMaxTransfer(guarded[0])
    with pytest.raises(NotAnEnsembleError, match="MORA looks inside an ensemble, but Guarded"):
        CrossMaxTransfer(make_ensemble(), attack=MORA, surrogate=guarded[0])


def test_refinement_starts_where_told_and_stays_around_the_clean_image(
    masked: tuple[CrossMax, Tensor, Tensor],
) -> None:
    model, x, y = masked
    far = (x + 0.5).clamp(0, 1)
    adversarial = APGD(model, eps=EPS, steps=5)(x, y, start=far)
    judge(model, x, y, adversarial, eps=EPS)
    with pytest.raises(ValueError, match="start has shape"):
        APGD(model, eps=EPS, steps=5)(x, y, start=far[:3])


class Scaled(nn.Module):
    """Stretched by 3 and shifted: no identity, and with a gradient that says nothing; ``size`` changes the shape, too."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate((x * 50).round() * 3 / 50 - 1, (self.size, self.size), mode="nearest")


@pytest.mark.parametrize("size", [6, 12])
def test_reversal_gets_behind_a_front_end_that_is_no_identity(size: int, batch: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential()
    model.frontend, model.pool = Scaled(size), nn.AdaptiveAvgPool2d(6)
    model.backbone = make_member(4).double()
    model.eval()
    x, y = batch[0], model(batch[0]).argmax(1)
    attack = FrontEndReversal(model, eps=EPS, steps=10)
    adversarial = attack(x, y)
    assert attack._amplification(x) == pytest.approx(3, rel=0.3)
    assert accuracy(model, adversarial, y) < accuracy(model, APGD(model, eps=EPS, steps=10)(x, y), y) - 0.2
    assert judge(model, x, y, adversarial, eps=EPS).accuracy == accuracy(model, adversarial, y)
    assert "forward" not in vars(model.frontend)


def test_reversal_sees_normalised_images_as_torchattacks_does(batch: tuple[Tensor, Tensor]) -> None:
    model = Guarded(frontend=Scaled()).eval()
    x, y = batch[0], model(batch[0]).argmax(1)
    plain = FrontEndReversal(model, eps=EPS, steps=5, amplification=3.0)(x, y)
    mean, std = [0.4, 0.5, 0.6], [0.3, 0.2, 0.25]
    shift, scale = (torch.tensor(v, dtype=x.dtype).view(3, 1, 1) for v in (mean, std))

    class OnNormalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frontend, self.backbone = nn.Sequential(Denormalise(), model.frontend), model.backbone

        def forward(self, z: Tensor) -> Tensor:
            return self.backbone(self.frontend(z))

    class Denormalise(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z * scale + shift

    attack = FrontEndReversal(OnNormalised().eval(), eps=EPS, steps=5, amplification=3.0)
    attack.set_normalization_used(mean, std)
    found = attack((x - shift) / scale, y) * scale + shift
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)


def test_reversal_of_another_model_and_of_images_that_normalising_rounds(batch: tuple[Tensor, Tensor]) -> None:
    model = Guarded(frontend=Scaled()).eval().float()
    x, y = batch[0].float().round(), batch[1]  # at 0, where (0 - m) / s * s + m may be below it
    attack = FrontEndReversal(Guarded().eval().float(), eps=EPS, steps=2, amplification=3.0)
    attack.set_model(model)
    expected = FrontEndReversal(model, eps=EPS, steps=2, amplification=3.0)(x, y)
    assert torch.equal(attack(x, y), expected)
    attack.set_normalization_used([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
    assert attack(attack.normalize(x), y).shape == x.shape


def test_reversal_names_what_it_cannot_reverse(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch[0], torch.zeros(len(batch[0]), dtype=torch.long)
    with pytest.raises(PartError, match="'front' is no part of Guarded"):
        FrontEndReversal(Guarded().eval(), part="front")
    with pytest.raises(PartError, match=r"members\.0\.frontend, members\.1\.frontend: name one"):
        FrontEndReversal(Ensemble([Guarded(), Guarded(1)]).eval())
    with pytest.raises(PartError, match=r"puts out \(8, 6, 6\) for images \(3, 6, 6\)"):
        FrontEndReversal(Guarded().eval(), part="backbone.0", eps=EPS)(x, y)
    with pytest.raises(ValueError, match="rounds must be"):
        FrontEndReversal(Guarded().eval(), rounds=0)


@pytest.mark.parametrize("attack", [partial(EOTAPGD, eot_iter=2), torchattacks.PGD, torchattacks.APGD])
def test_what_is_bound_to_the_refinement_stays(attack: Callable[..., object]) -> None:
    refine = partial(EOTAPGD, norm="Linf", eps=0.05, eot_iter=7, seed=3, steps=9)
    refinement = CrossMaxTransfer(make_ensemble(), attack=attack, refine=refine, eps=EPS).refine
    assert isinstance(refinement, EOTAPGD)
    assert (refinement.eps, refinement.eot_iter, refinement.seed, refinement.steps) == (0.05, 7, 3, 9)
    refinement = CrossMaxTransfer(make_ensemble(), refine=A3, eps=EPS).refine
    assert isinstance(refinement, A3)
    assert refinement.eps == EPS


def test_a_surrogate_ensemble_keeps_its_vote(batch: tuple[Tensor, Tensor]) -> None:
    model = make_ensemble("voting")
    direct = MORA(model, eps=EPS, steps=5)(*batch)
    assert torch.equal(MORA(Surrogate(model, model), eps=EPS, steps=5)(*batch), direct)
