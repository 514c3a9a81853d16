"""A wrapper whose forward waits for other processes is refused at every entrance, before it is asked anything."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

import ensemble_attacks
from ensemble_attacks import APGD, AutoAttack, CrossMaxTransfer, Ensemble, MinimalNorm, as_ensemble, judge
from ensemble_attacks.attacks.careful import CarefulAttack
from ensemble_attacks.attacks.foreign import craft
from ensemble_attacks.diagnostics import binarization, diagnose, indicators
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.suite import Settings
from ensemble_attacks.hosts import robustbench as host
from ensemble_attacks.models.structure import structure_of
from ensemble_attacks.models.surrogates import ZeroOrder
from tests.helpers import make_ensemble, make_member

pytestmark = pytest.mark.filterwarnings("ignore")  # of what robustbench imports
X = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.zeros(4, dtype=torch.long)
ASKED: list[int] = []


class Wrapper(nn.Module):
    """What the real ones look like, which need a group of processes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        ASKED.append(len(x))
        return self.module(x)


class DistributedDataParallel(Wrapper):
    pass


class FullyShardedDataParallel(Wrapper):
    pass


class FSDPModule(Wrapper):
    pass


class FSDPLinear(FSDPModule):
    """As FSDP2 does it, which gives a network a class of its own."""


def around(wrapper: Callable[[nn.Module], nn.Module]) -> dict[str, Callable[[], Any]]:
    """Return where a wrapper may sit."""
    members = list(make_ensemble(dtype=torch.float32).members)
    return {
        "itself": lambda: wrapper(make_member()),
        "a member": lambda: Ensemble([*members, wrapper(make_member())]).eval(),
        "every member": lambda: Ensemble([wrapper(member) for member in members]).eval(),
        "below": lambda: nn.Sequential(nn.Identity(), nn.Sequential(wrapper(make_member()))).eval(),
        "a function": lambda: wrapper(make_member()).forward,
        "a lambda": lambda: partial(lambda net, x: net(x), wrapper(make_member())),
        "estimated": lambda: ZeroOrder(wrapper(make_member())),
    }


OURS = [
    kind
    for kind in (getattr(ensemble_attacks, name) for name in ensemble_attacks.__all__)
    if inspect.isclass(kind) and issubclass(kind, CarefulAttack) and kind is not CarefulAttack
]


def autoattack(model: Any, version: str) -> Any:
    attacks = ["apgd-ce"] if version == "custom" else []
    adversary = AutoAttack(model, eps=0.1, version=version, attacks_to_run=attacks, verbose=False, seed=0)
    return adversary.run_standard_evaluation(X, Y)


ENTRANCES: dict[str, Callable[[Any], Any]] = {
    "judge": lambda model: judge(model, X, Y, X, eps=0.1),
    "evaluate": lambda model: evaluate(model, X, Y, ["ea-apgd-ce"], Settings(0.1)),
    "diagnose": lambda model: diagnose(model, X, Y, eps=0.1),
    "structure_of": lambda model: structure_of(model, X),
    "as_ensemble": lambda model: as_ensemble(model, [""], "logits", inputs=X),
    "indicators": lambda model: indicators(lambda net, eps: APGD(net, eps=eps, steps=2), model, X, Y, eps=0.1),
    "indicators' target": lambda model: indicators(
        lambda net, eps: APGD(net, eps=eps, steps=2), make_member(), X, Y, eps=0.1, target=model
    ),
    "binarization": lambda model: binarization(lambda net: APGD(net, eps=0.1, steps=2), model, X, eps=0.1),
    "robustbench": lambda model: host.benchmark(model, eps=0.1, n_examples=4, data_dir="nowhere"),
    "torchattacks": lambda model: craft(torchattacks.PGD(model, eps=0.1, steps=2), X, Y, seed=0, batch_size=4),
    "set_model": lambda model: APGD(make_member(), eps=0.1, steps=2).set_model(model),
    "CrossMaxTransfer.set_model": lambda model: CrossMaxTransfer(make_ensemble(), eps=0.1, steps=2).set_model(model),
    "CrossMaxTransfer's surrogate": lambda model: CrossMaxTransfer(
        make_ensemble(dtype=torch.float32), surrogate=model, attack=torchattacks.PGD, refine=None, eps=0.1, steps=2
    )(X, Y),
    **{
        f"AutoAttack, {version}": partial(autoattack, version=version)
        for version in ("standard", "custom", "adaptive", "auto")
    },
    **{kind.__name__: kind for kind in OURS if kind is not MinimalNorm},
    "MinimalNorm": lambda model: MinimalNorm(APGD(model, eps=0.1, steps=2)),
}
NO_FUNCTIONS = ("torchattacks", "CrossMaxTransfer's surrogate")  # which take modules alone


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_no_entrance_asks_a_collective(entrance: str) -> None:
    for wrapper in (DistributedDataParallel, FullyShardedDataParallel, FSDPModule, FSDPLinear):
        for place, make in around(wrapper).items():
            if entrance in NO_FUNCTIONS and place in ("a function", "a lambda"):
                continue
            ASKED.clear()
            with pytest.raises(TypeError, match=r"pass its \.module"):
                ENTRANCES[entrance](make())
            assert not ASKED, (wrapper, place)
