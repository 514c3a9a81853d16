"""What is random in the model as it is handed over stays random, whatever it is called, or the result is flagged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from ensemble_attacks import PGD, AutoAttack, judge
from ensemble_attacks.models.structure import structure_of

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit.script is deprecated, and used
DRAWS = 40


class Noise(nn.Module):
    """Noise of one's own, in training mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


class Always(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.7, training=True)


class Slope(nn.Module):
    """RReLU of what is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.RReLU(-20, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.slope(x - 1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.7, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1, 2)
        return self.attention(rows, rows, rows)[0].view_as(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, 2, dropout=0.8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.flatten(1, 2))[0].view_as(x)


class DropPath(nn.Module):
    """As timm's: the share that is kept is a number, and it asks whether it is being trained."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty((len(x), 1, 1, 1)).bernoulli_(0.4) / 0.4


class Around(nn.Module):
    """A model that is itself the random part."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + torch.randn_like(x) if self.training else x)


PARTS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.8),
    "feature alpha dropout": lambda: nn.FeatureAlphaDropout(0.6),
    "stochastic depth": lambda: torchvision.ops.StochasticDepth(0.7, "row"),
    "drop block": lambda: torchvision.ops.DropBlock2d(0.5, 3),
    "drop path": DropPath,
    "noise": Noise,
    "functional dropout": Always,
    "scripted dropout": lambda: torch.jit.script(nn.Sequential(nn.Dropout(0.8))),
    "rrelu": Slope,
    "attention": Attention,
    "lstm": Recurrent,
}
HOLDING = ("attention", "lstm")  # parameters: in training mode, they alone make a model one that is being trained


def put_back(part: nn.Module, net: nn.Module) -> nn.Module:
    model = nn.Sequential(part, net).eval()
    model[0].train()
    return model


def never_in_eval(part: nn.Module, net: nn.Module) -> nn.Module:
    return nn.Sequential(part.train(), net.eval())


def scripted(part: nn.Module, net: nn.Module) -> nn.Module:
    return torch.jit.script(put_back(part, net))


MADE: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
    "put back": put_back,
    "never in eval mode": never_in_eval,
    "scripted": scripted,
}
CASES = [
    (name, how)
    for name in PARTS
    for how in MADE
    if not (name in HOLDING and how == "never in eval mode") and not (name in ("drop block", "rrelu") and how == "scripted")
]


def case(name: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Return a part, a network, images, and the labels that these give them without randomness."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        part, net = PARTS[name](), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
        x = torch.rand(64, 1, 8, 8)
    return part, net, x, net(part.eval()(x)).argmax(1)


@torch.no_grad()
def own_share(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return sum((model(x).argmax(1) == y).double().mean().item() for _ in range(DRAWS)) / DRAWS


@pytest.mark.parametrize(("name", "how"), CASES)
def test_what_is_random_stays_random(name: str, how: str) -> None:
    part, net, x, y = case(name)
    model = MADE[how](part, net)
    flags = [module.training for module in model.modules()]
    own = own_share(model, x, y)
    assert own < 0.99
    assert structure_of(model, x).random
    assert judge(model, x, y, x, eps=0.1, draws=DRAWS).accuracy == pytest.approx(own, abs=0.05)
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("name", PARTS)
def test_autoattack_sees_it(name: str) -> None:
    part, net, x, y = case(name)
    model = put_back(part, net)
    attack = PGD(model, eps=1e-6, steps=1, n_restarts=1)
    adversary = AutoAttack(model, eps=1e-6, seed=0, verbose=False, attacks_to_run=[attack])
    adversary.run_standard_evaluation(x[:16], y[:16])
    assert "random" in {flag.name for flag in adversary.flags}
    assert adversary.robust_accuracy == pytest.approx(own_share(model, x[:16], y[:16]), abs=0.12)


@pytest.mark.parametrize("name", HOLDING)
def test_what_cannot_be_told_from_training_is_flagged(name: str) -> None:
    part, net, x, y = case(name)
    model = never_in_eval(part, net)
    attack = PGD(model, eps=1e-6, steps=1, n_restarts=1)
    adversary = AutoAttack(model, eps=1e-6, seed=0, verbose=False, attacks_to_run=[attack])
    adversary.run_standard_evaluation(x[:4], y[:4])
    assert "training_mode" in {flag.name for flag in adversary.flags}


def test_a_model_that_is_itself_random() -> None:
    _, net, x, y = case("noise")
    model = Around(net)
    assert judge(model, x, y, x, eps=0.1, draws=DRAWS).accuracy == pytest.approx(own_share(model, x, y), abs=0.05)
    assert judge(model.eval(), x, y, x, eps=0.1).accuracy == 1
