"""When samples leave the batch changes nothing but the passes, and on a device nobody waits for them step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defenses.randomized import RandomizedEnsemble
from ensemble_attacks import A3, APGD, ARC, EOTAPGD, LAFEAT, MORA, PGD, Ensemble
from ensemble_attacks.descent import batch as module
from ensemble_attacks.descent import loop
from ensemble_attacks.descent.batch import AT_ONCE, Rhythm
from ensemble_attacks.descent.stages import Trace
from ensemble_attacks.models.passes import count_passes
from tests.helpers import make_ensemble
from tests.simulated_device import AVAILABLE, DEVICE, simulated

EPS = 0.03


class Alone(nn.Module):
    """A network that computes every image's scores by itself, to the last bit, whatever batch it is in."""

    def __init__(self, seed: int, classes: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.Parameter(torch.randn(classes, 3, 6, 6, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(weight * x).tanh().flatten(1).sum(1) for weight in self.weights], 1)


ATTACKS: dict[str, Callable[[nn.Module], Any]] = {
    "mora": lambda model: MORA(model, eps=0.1, steps=8, betas=(0.5, 0.0), targets=1),
    "mora L2": lambda model: MORA(model, eps=0.6, norm="L2", steps=8, betas=(0.5, 0.0), aimed=False),
    "apgd": lambda model: APGD(model, eps=0.1, steps=20),
    "pgd": lambda model: PGD(model, eps=0.1, steps=6, n_restarts=2),
    "a3": lambda model: A3(model, eps=0.1, n_restarts=3),
}


@pytest.mark.parametrize(
    "rhythm", [Rhythm(1, 1.0), Rhythm(3, 0.5), Rhythm(4, 0.75), Rhythm(0, 0.0), Rhythm(99, 1.0)], ids=str
)
@pytest.mark.parametrize("name", ATTACKS)
def test_any_rhythm_ends_at_the_same_images(
    name: str, rhythm: Rhythm, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Ensemble([Alone(seed) for seed in range(2)]).eval()
    images = batch[0][:16]
    labels = model(images).argmax(1)
    found: list[tuple[Tensor, Tensor, list[int], int]] = []
    for chosen in (AT_ONCE, rhythm):
        monkeypatch.setattr(module, "AT_ONCE", chosen)
        counted = count_passes(model)
        attack = ATTACKS[name](counted)
        attack.trace = Trace()
        adversarial = attack(images, labels)
        fooled = [row["fooled"] for row in attack.trace.rows() if row["fooled"]]
        found.append((adversarial, attack.trace.fooled_in[0], fooled, counted.forwards))
        assert sum(row["forwards"] for row in attack.trace.rows()) == counted.forwards
    (at_once, stages, fooled, passes), (in_time, stages_too, fooled_too, more) = found
    assert torch.equal(in_time, at_once)
    assert torch.equal(stages_too, stages)
    assert fooled_too == fooled
    assert len(fooled) > 1
    assert more > passes


WAITS: dict[str, tuple[Callable[[nn.Module, int], Any], float]] = {  # at most, a look
    "mora": (lambda model, steps: MORA(model, eps=EPS, steps=steps, betas=(0.5,)), 0.2),
    "apgd": (lambda model, steps: APGD(model, eps=EPS, steps=steps), 0.2),
    "pgd": (lambda model, steps: PGD(model, eps=EPS, steps=steps, n_restarts=2), 0.2),
    "eot-apgd": (lambda model, steps: EOTAPGD(model, eps=EPS, steps=steps, eot_iter=2), 0.2),
    "mora L2": (lambda model, steps: MORA(model, norm="L2", eps=6 * EPS, steps=steps, betas=(0.5, 0.0)), 0.2),
    "lafeat": (lambda model, steps: LAFEAT(model, eps=EPS, steps=steps), 0.2),
    "arc": (lambda model, steps: ARC(randomized(model), eps=EPS, steps=steps), 0.2),
    "mora, randomized": (lambda model, steps: MORA(randomized(model), eps=EPS, steps=steps, betas=(0.5,), eot_iter=2), 0.2),
}
DEAR = ("mora", "apgd", "pgd", "eot-apgd")


def randomized(model: Any) -> nn.Module:
    return RandomizedEnsemble(list(model.members), seed=0).eval()


@pytest.mark.skipif(not AVAILABLE, reason="this PyTorch has no hooks for devices written in Python")
@pytest.mark.parametrize("name", [name if name in DEAR else pytest.param(name, marks=pytest.mark.slow) for name in WAITS])
def test_the_host_does_not_wait_at_every_step(
    name: str, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, most = WAITS[name]
    looks = [0]
    look = loop.look

    def counted(*args: Any, **options: Any) -> Any:
        looks[0] += 1
        return look(*args, **options)

    monkeypatch.setattr(loop, "look", counted)
    spent = []
    with simulated() as device:
        images, labels = (t[:4].to(DEVICE) for t in batch)
        for steps in (4, 12):
            attack = make(make_ensemble().to(DEVICE), steps)
            before = device.waits, looks[0]
            attack(images, labels)
            spent.append((device.waits - before[0], looks[0] - before[1]))
    (waits, taken), (more_waits, more_taken) = spent
    assert more_taken > taken
    assert more_waits - waits <= most * (more_taken - taken), device.places.most_common(5)
