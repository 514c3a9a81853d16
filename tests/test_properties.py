"""What holds of every attack and of the judge, whatever the model, the data and the settings are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ensemble_attacks import APGD, MORA, PGD, CrossMaxTransfer, Ensemble, judge
from ensemble_attacks.attacks.careful import CarefulAttack
from tests.helpers import VOTES

ATTACKS: dict[str, Callable[..., CarefulAttack]] = {
    "apgd": lambda model, **ball: APGD(model, steps=4, n_restarts=2, **ball),
    "cw": lambda model, **ball: PGD(model, steps=3, n_restarts=1, loss="margin", **ball),
    "pgd": lambda model, **ball: PGD(model, steps=3, n_restarts=2, **ball),
    "mora": lambda model, **ball: MORA(model, steps=6, betas=(0.5, 0.0), targets=2, **ball),
    "crossmax": lambda model, **ball: CrossMaxTransfer(model, attack=APGD, refine=APGD, refine_steps=2, steps=3, **ball),
}
EXAMPLES = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


class Case:
    """A random ensemble with random images."""

    def __init__(
        self, seed: int, members: int, classes: int, shape: tuple[int, int, int], n: int, vote: str, dtype: torch.dtype
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            size = torch.Size(shape).numel()
            nets = [
                nn.Sequential(nn.BatchNorm2d(shape[0]), nn.Flatten(), nn.Linear(size, 8), nn.Tanh(), nn.Linear(8, classes))
                for _ in range(members)
            ]
            self.model = Ensemble(nets, vote).to(dtype).eval()
            self.x = torch.rand(n, *shape, dtype=dtype).round(decimals=2)  # with pixels on the box's faces
        with torch.no_grad():
            self.y = self.model(self.x).argmax(1)

    def __repr__(self) -> str:
        return f"{self.model.vote} of {len(self.model.members)}, {tuple(self.x.shape)} {self.x.dtype}"


cases = st.builds(
    Case,
    seed=st.integers(0, 2**16),
    members=st.integers(1, 4),
    classes=st.integers(2, 6),
    shape=st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(2, 6)),
    n=st.integers(1, 6),
    vote=st.sampled_from(VOTES),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
balls = st.one_of(
    st.fixed_dictionaries({"norm": st.just("Linf"), "eps": st.floats(0.001, 0.5)}),
    st.fixed_dictionaries({"norm": st.just("L2"), "eps": st.floats(0.01, 2.0)}),
)


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [part.training for part in model.modules()],
        "random": torch.get_rng_state(),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    values = all(torch.equal(value, after["values"][name]) for name, value in before["values"].items())
    return values and before["modes"] == after["modes"] and torch.equal(before["random"], after["random"])


def size(x: Tensor, adversarial: Tensor, norm: str) -> float:
    delta = (adversarial.double() - x.double()).flatten(1)
    return (delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)).max().item()


@pytest.mark.parametrize("name", ATTACKS)
@EXAMPLES
@given(case=cases, ball=balls, training=st.booleans())
def test_images_lie_in_ball_and_box_and_nothing_is_changed(name: str, case: Case, ball: Any, training: bool) -> None:
    case.model.train(training)
    before, images = state_of(case.model), case.x.clone()
    adversarial = ATTACKS[name](case.model, **ball)(case.x, case.y)
    assert same(before, state_of(case.model))
    assert torch.equal(case.x, images)
    assert adversarial.shape == images.shape
    assert adversarial.dtype == images.dtype
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert size(images, adversarial, ball["norm"]) <= ball["eps"]
    found = judge(case.model, case.x, case.y, adversarial, batch_size=4, **ball)
    with torch.no_grad():
        assert torch.equal(found.robust, case.model.eval()(adversarial).argmax(1) == case.y)


@pytest.mark.parametrize("name", ATTACKS)
@EXAMPLES
@given(case=cases, ball=balls, batch_size=st.integers(1, 3), targeted=st.booleans())
def test_order_and_batches_make_no_difference(name: str, case: Case, ball: Any, batch_size: int, targeted: bool) -> None:
    case.model.double()  # sums in another order differ by less than a step can tell
    x, attack = case.x.double(), ATTACKS[name](case.model, **ball)
    if targeted and "targeted" in attack.supported_mode:
        attack.set_mode_targeted_random(quiet=True)
    whole = attack(x, case.y)
    torch.testing.assert_close(attack(x.flip(0), case.y.flip(0)).flip(0), whole, rtol=0, atol=1e-8)
    parts = [attack(*part) for part in zip(x.split(batch_size), case.y.split(batch_size), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ATTACKS)
@EXAMPLES
@given(case=cases, ball=balls, after=st.integers(0, 12), training=st.booleans())
def test_an_error_at_any_call_leaves_all_as_it_was(name: str, case: Case, ball: Any, after: int, training: bool) -> None:
    calls = iter(range(10**6))

    def breaking(module: nn.Module, arguments: Any) -> None:
        if next(calls) >= after:
            raise KeyboardInterrupt

    case.model.train(training)
    attack = ATTACKS[name](case.model, **ball)
    before, images = state_of(case.model), case.x.clone()
    handle = case.model.members[0].register_forward_pre_hook(breaking)
    try:
        attack(case.x, case.y)
    except KeyboardInterrupt:
        pass
    finally:
        handle.remove()
    assert same(before, state_of(case.model))
    assert torch.equal(case.x, images)
    assert torch.is_grad_enabled()
