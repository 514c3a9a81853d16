"""Peers' defenses: iGAT's rule and regulariser against their definitions; the purifier against a case known exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from defenses import load_model, train_model
from defenses.igat import distribute, distributing_probabilities, interactive_loss, severest_weakness
from defenses.purified import Denoiser, Purifier
from defenses.recipes import RECIPES, SETTINGS
from defenses.training import Batch
from ensemble_attacks import BPDAIdentity
from ensemble_attacks.data import load_dataset


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_an_example_goes_to_a_member_by_its_rank() -> None:
    assert distributing_probabilities(3).tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    confidence = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 2.0]])  # of three members in the label of two examples
    logits_MNK = torch.stack([confidence, torch.zeros(3, 2)], dim=-1).repeat(1, 3500, 1)
    given = distribute(logits_MNK, torch.zeros(7000, dtype=torch.long), generator())
    for example, order in enumerate(([1, 2, 0], [0, 1, 2])):
        shares = given[example::2].bincount(minlength=3) / 3500
        assert shares[order].tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=0.03)


def test_the_regulariser_is_that_of_the_worst_member_and_keeps_its_gradient() -> None:
    logits_MNK, labels = torch.randn(3, 5, 4, generator=generator(), dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    others = logits_MNK.softmax(-1).scatter(-1, labels.expand(3, -1)[..., None], 0.0)
    torch.testing.assert_close(severest_weakness(logits_MNK, labels), -(1 - others.amax(-1).amax(0)).log())
    sure = torch.tensor([[[0.0, 40.0, 0.0]]], requires_grad=True)  # wrong, with a probability that rounds to 1
    (gradient,) = torch.autograd.grad(severest_weakness(sure, torch.tensor([0])).sum(), sure)
    assert gradient[0, 0].tolist() == pytest.approx([-0.5, 1.0, -0.5], abs=1e-4)


def test_what_the_ensemble_gets_right_costs_nothing() -> None:
    ensemble = load_model("adp_convnet_3", dataset="digits").train()
    images, labels = load_dataset("digits", "train", n=40)
    right = ensemble(images).argmax(1) == labels
    x, y = images[right], labels[right]
    data = replace(SETTINGS["digits"], eps=1e-6)
    batch = Batch(ensemble, x, y, lambda: x, generator(), 0, data)
    assert interactive_loss(batch).item() == 0
    assert interactive_loss(replace(batch, data=replace(data, eps=0.3))).item() > 0


@pytest.mark.parametrize(("name", "start"), [("adp_igat", "adp"), ("dverge_igat", "dverge")])
def test_interactive_training_goes_on_from_the_defense(name: str, start: str) -> None:
    assert RECIPES[name].start_from == start
    assert RECIPES[name].negative_slope == RECIPES[start].negative_slope


class Exact(torch.nn.Module):
    """The mean of what was there before the noise, where pixels are normal about 0.5."""

    def __init__(self, variance: float) -> None:
        super().__init__()
        self.variance = variance

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return 0.5 + (x - 0.5) * self.variance / (self.variance + scale**2)


def test_with_an_exact_denoiser_purified_images_are_distributed_as_clean_ones() -> None:
    """Also those that an attack has moved; one step of the denoiser alone would leave less than a third of the spread."""
    deviation = 0.05
    scales = [0.2 * 0.93**step for step in range(60)]
    purifier = Purifier(Exact(deviation**2), scales)
    purifier.own_draws(0)
    shift = 0.1
    clean = 0.5 + deviation * torch.randn(400, 1, 8, 8, generator=generator())
    for x, mean in ((clean, 0.5), (clean + shift, 0.5 + shift * deviation**2 / (deviation**2 + 0.2**2))):
        purified = purifier(x)
        assert purified.mean().item() == pytest.approx(mean, abs=2e-3)
        assert purified.std().item() == pytest.approx(deviation, rel=0.05)
    assert Purifier(Exact(deviation**2), [0.2])(clean).std().item() < deviation / 3


def test_a_purifiers_draws_are_fresh_seedable_and_freezable() -> None:
    purifier, x = Purifier(Denoiser(1, 3, 4)).eval(), torch.rand(2, 1, 8, 8, generator=generator())
    state = torch.get_rng_state()
    assert not torch.equal(purifier(x), purifier(x))
    with purifier.frozen_noise(3):
        torch.testing.assert_close(purifier(x)[1:], purifier(x[1:]))
    purifier.own_draws(1)
    first = purifier(x)
    purifier.own_draws(1)
    assert torch.equal(purifier(x), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.min() >= 0
    assert first.max() <= 1


@pytest.mark.parametrize("scales", [(), (0.1, 0.1), (0.1, 0.2), (0.1, 0.0), (math.inf, math.nan)])
def test_scales_that_cannot_be(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="scales must be positive and decrease"):
        Purifier(Denoiser(1), scales)


def test_a_purifier_leaves_its_backbone_alone_and_is_a_front_end(tmp_path: Path) -> None:
    card = train_model("purified", members=1, epochs=1, out=tmp_path)
    model: Any = load_model(card.stem, tmp_path, "digits").members[0]
    state = load_model("standard_convnet_3", dataset="digits").members[0].state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.backbone.state_dict().items())
    x, y = load_dataset("digits", n=4)
    attack = BPDAIdentity(model, eps=0.1, steps=2, eot_iter=2)
    assert attack(x, y).shape == x.shape
    assert attack.premise["frontend"]["relative"] > 0
