"""Defenses that mask their gradients: the multi-resolution self-ensemble and the front end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torchvision.transforms.v2 import functional as transforms

from defenses.crossmax import crossmax
from defenses.frontend import DnCNN, FrontEnded
from defenses.multiresolution import SelfEnsembles, convnet, resnet20, resnet152
from defenses.stack import Stack, roll
from ensemble_attacks import APGD, BPDAIdentity, CrossMaxTransfer, judge
from tests.helpers import make_member


def images(n: int = 4, channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def test_roll_is_torchs_own() -> None:
    x = images()
    down, right = torch.tensor([0, 1, -3, 2]), torch.tensor([0, -2, 3, 31])
    expected = [torch.roll(image, (int(d), int(r)), (1, 2)) for image, d, r in zip(x, down, right, strict=True)]
    assert torch.equal(roll(x, down, right), torch.stack(expected))


def test_without_noise_the_stack_is_the_published_chain() -> None:
    x = images()
    stack = Stack((32, 8), down_noise=0, up_noise=0, jitter=0, colour=(0.6, 0.6), faithful_contrast_bug=True)
    full, low = stack(x, torch.Generator()).chunk(2, dim=1)
    contrasted = transforms.adjust_contrast(x, 0.6)
    mixed = 0.6 * contrasted + 0.4 * contrasted.mean(1, keepdim=True)
    torch.testing.assert_close(full, mixed.clamp(0, 1), rtol=0, atol=1e-5)
    small = torch.nn.functional.interpolate(mixed, (8, 8), mode="bicubic")
    large = torch.nn.functional.interpolate(small, (32, 32), mode="bicubic")
    torch.testing.assert_close(low, large.clamp(0, 1), rtol=0, atol=1e-5)
    paper = Stack((32,), down_noise=0, up_noise=0, jitter=0, colour=(1, 1), contrast=(1.3, 1.3), faithful_contrast_bug=False)
    torch.testing.assert_close(paper(x, torch.Generator()), transforms.adjust_contrast(x, 1.3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_draws_are_fresh_seedable_and_freezable(noise: str) -> None:
    model, x = resnet20(noise=noise).eval(), images()
    state = torch.get_rng_state()
    assert not torch.equal(model(x), model(x))
    with model.frozen_noise(3):
        first = model(x)
        assert torch.equal(model(x), first)
        exact, wide = model.double(), x.double()  # in float32 the scores, which reach 20, round by as much
        torch.testing.assert_close(exact(wide[1:2]), exact(wide)[1:2], rtol=0, atol=1e-4)  # whatever else is in the batch
        model.float()
    model.own_draws(3)
    second = model(x)
    model.own_draws(3)
    assert torch.equal(model(x), second)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_stack_lets_the_gradient_through() -> None:
    model, x = resnet20().eval(), images().requires_grad_()
    logits = model.member_logits(x)
    assert logits.shape == (8, 4, 10)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert (gradient != 0).float().mean() > 0.9
    assert model(x).shape == (4, 10)


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_probes_do_not_train_the_network() -> None:
    model, x = convnet().train(), images(channels=1, size=8)
    model.member_logits(x)[:-1].sum().backward()
    assert not any(gradient_of(parameter).any() for parameter in model.stages.parameters())
    assert all(gradient_of(parameter).any() for parameter in model.get_submodule("probes.0.2").parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stack((32, 0)), "at least one size of at least 1 pixel"),
        (lambda: Stack(()), "at least one size"),
        (lambda: Stack((64, 32))(images(), torch.Generator()), r"above the images' 32 pixels"),
        (lambda: Stack(noise="gausian"), "did you mean 'gaussian'"),
        (lambda: resnet20(k=9), "k must be at most 8"),
    ],
)
def test_stacks_that_cannot_be(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_self_ensembles_and_their_surrogate() -> None:
    model = SelfEnsembles([convnet(), convnet()]).eval()
    x = images(n=30, channels=1, size=8)
    assert model.member_logits(x).shape == (8, 30, 10)
    y = model(x).argmax(1)
    logits = model.member_logits(x)
    own = [member.aggregate(part) for member, part in zip(model.members, logits.split(4), strict=True)]
    assert torch.equal(model.aggregate(logits), crossmax(torch.stack(own)))
    adversarial = CrossMaxTransfer(model, eps=0.1, steps=2, refine_steps=2, eot_iter=2)(x, y)
    judge(model, x, y, adversarial, eps=0.1, draws=2)


@pytest.mark.slow
def test_the_published_network_builds_and_runs() -> None:
    model = resnet152(num_classes=100).eval()
    assert [probe.get_submodule("1").num_features for probe in model.probes] == [200704] * 5 + [100352, 2048]
    assert model.member_logits(images(n=2)).shape == (8, 2, 100)


def test_a_front_end_starts_as_the_identity() -> None:
    frontend, x = DnCNN().eval(), images()
    assert torch.equal(frontend(x), x)
    backbone = make_member(4)
    model = FrontEnded(backbone, DnCNN(depth=5, width=8)).train()
    assert not model.backbone.training
    assert model.frontend.training
    small = images(size=6)
    torch.testing.assert_close(model.eval()(small), backbone(small), rtol=0, atol=1e-5)
    assert [name for name, p in model.named_parameters() if p.requires_grad and "backbone" in name] == []


def test_bpda_finds_the_front_end() -> None:
    model = FrontEnded(make_member(4), DnCNN(depth=5, width=8)).eval()
    x = images(n=20, size=6)
    y = model(x).argmax(1)
    attack = BPDAIdentity(model, attack=APGD, eps=0.1, steps=5)
    judge(model, x, y, attack(x, y), eps=0.1)
    assert attack.premise["frontend"]["relative"] < 1e-6
    assert attack.premise["gradient_cosine"] == pytest.approx(1, abs=1e-4)
