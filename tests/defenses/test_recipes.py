"""The training losses, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from defenses.dverge import distil, features, layers
from defenses.gal import coherence
from defenses.recipes import SETTINGS
from defenses.training import Batch, input_gradients
from defenses.training.ascent import pgd, sign_ascent
from defenses.trs import gradient_similarity, smoothness
from defenses.zoo.cards import make_ensemble
from ensemble_attacks.data import load_dataset


def batch_of(amp: bool = False) -> Batch:
    images, labels = load_dataset("digits", "train", n=12)
    torch.manual_seed(0)
    ensemble = make_ensemble("convnet", 3).train()
    generator = torch.Generator().manual_seed(0)
    return Batch(ensemble, images[:6], labels[:6], lambda: images[6:], generator, 0, SETTINGS["digits"], amp)


def test_coherence_is_the_log_sum_exp_of_the_cosines() -> None:
    east, north = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[0.0, 3.0]]]])
    value = coherence(torch.stack([east, north, -east]))
    assert value.shape == (1,)
    assert value.item() == pytest.approx(math.log(1 + math.exp(-1) + 1))
    assert coherence(torch.stack([east, 5 * east])).item() == pytest.approx(1)


def test_similarity_does_not_tell_opposed_from_aligned() -> None:
    east, north = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[0.0, 3.0]]]])
    assert gradient_similarity(torch.stack([east, -east, north])).item() == pytest.approx(1 / 3)
    assert smoothness(torch.stack([east, north])).item() == pytest.approx(2 * (4 + 9) / 2)


def test_input_gradients_are_each_members_own() -> None:
    batch = batch_of()
    logits, gradients = input_gradients(batch, batch.x)
    for member, gradient, own in zip(batch.ensemble.members, gradients, logits, strict=True):
        x = batch.x.clone().requires_grad_()
        loss = nn.functional.cross_entropy(member(x), batch.y, reduction="sum")
        torch.testing.assert_close(gradient, torch.autograd.grad(loss, x)[0])
        torch.testing.assert_close(own, member(batch.x))


def test_the_layers_of_a_resnet20_are_twenty() -> None:
    assert len(layers(make_ensemble("resnet20", 1).members[0])) == 20
    assert len(layers(make_ensemble("resnet20b", 1).members[0])) == 20
    assert len(layers(make_ensemble("convnet", 1).members[0])) == 4
    foreign = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    assert layers(foreign) == [foreign[1], foreign[4]]


def test_a_blocks_second_features_include_the_shortcut() -> None:
    member = make_ensemble("resnet20", 1).eval().members[0]
    x = torch.rand(2, 3, 32, 32)
    stem = torch.relu(features(member, layers(member)[0], x))
    second = features(member, layers(member)[2], x)
    block = member.layer1[0]
    inner = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(stem.view(2, 16, 32, 32))))))
    torch.testing.assert_close(second, inner.flatten(1) + stem)


def test_features_are_a_layers_output_and_leave_no_hook() -> None:
    member = make_ensemble("convnet", 1).members[0]
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(features(member, member.conv1, x), member.conv1(2 * x - 1).flatten(1))
    torch.testing.assert_close(features(member, member.linear2, x), member(x))
    assert not member.conv1._forward_hooks


@pytest.mark.parametrize("layer", range(4))
def test_distilled_images_come_near_the_targets_features(layer: int) -> None:
    batch = batch_of()
    targets = batch.other_images()
    distilled = distil(batch, 1, targets, layer)
    member = batch.ensemble.members[1]

    def distance(x: Tensor) -> Tensor:
        return (features(member, layers(member)[layer], x) - features(member, layers(member)[layer], targets)).norm(dim=1)

    assert (distance(distilled) < distance(batch.x)).all()
    assert (distilled - batch.x).abs().max() <= batch.data.distillation_eps + 1e-6
    assert batch.ensemble.training


def test_momentum_accumulates_normalised_gradients() -> None:
    x = torch.full((1, 1, 1, 2), 0.5)
    pulls = iter([torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0])])
    moved = sign_ascent(lambda z: (z * next(pulls)).sum((1, 2, 3)), x, eps=0.3, step=0.1, momentum=1.0, steps=3)
    torch.testing.assert_close(moved - x, torch.tensor([[[[0.1 + 0.1 - 0.1, 0.3]]]]))


@pytest.mark.parametrize("member", [None, 2])
def test_pgd_raises_the_loss_inside_the_ball(member: int | None) -> None:
    batch = batch_of()
    adversarial = pgd(batch, member)
    assert (adversarial - batch.x).abs().max() <= batch.data.eps + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    index = 0 if member is None else member
    losses = [nn.functional.cross_entropy(batch.logits(x, index), batch.y) for x in (batch.x, adversarial)]
    assert losses[1] > losses[0]
