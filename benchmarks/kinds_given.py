"""Kinds of ensembles that are made of given networks, as somebody else's code puts them together."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensemble_attacks import as_ensemble

Nets = list[nn.Module]
WEIGHTS = (3.0, 2.0, 1.0)
PROBABILITIES = (0.5, 0.3, 0.2)
SIGMA, COPIES = 0.01, 5  # of the noise of randomised smoothing, and how many answers are counted


@dataclass(frozen=True)
class Training:
    """Images (N, C, H, W) and labels (N,) to train on, for kinds that are trained on the spot."""

    x: Tensor
    y: Tensor
    seed: int = 0


class Theirs(nn.Module):
    """Networks, and code that puts their logits (M, N, K) together."""

    def __init__(self, nets: Nets, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.nets, self.rule = nn.ModuleList(nets), rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(torch.stack([net(x) for net in self.nets]))


class Views(nn.Module):
    """One network's mean probability over an image and its shifts by a pixel."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def logits(self, x: Tensor) -> Tensor:
        return torch.stack([self.net(x.roll(shift, -1)) for shift in (-1, 0, 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).softmax(-1).mean(0)


class Smoothing(nn.Module):
    """Counts of one network's answers to an image with Gaussian noise."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return sum(counts(self.net(x + SIGMA * torch.randn_like(x))) for _ in range(COPIES))  # type: ignore[return-value]


class Lottery(nn.Module):
    """One of the networks, drawn for each call, answers."""

    def __init__(self, nets: Nets) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        return self.nets[int(torch.multinomial(torch.tensor(PROBABILITIES), 1))](x)


class Experts(nn.Module):
    """Networks, and a gate that weighs their probabilities, or chooses one, by the image."""

    def __init__(self, nets: Nets, x: Tensor, top: bool) -> None:
        super().__init__()
        self.nets, self.top = nn.ModuleList(nets), top
        generator = torch.Generator().manual_seed(0)
        linear = nn.Linear(4 * x.shape[1], len(nets))
        linear.weight.data = 4 * torch.randn(linear.weight.shape, generator=generator)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), linear)

    def forward(self, x: Tensor) -> Tensor:
        p_MNK, g_NM = torch.stack([net(x) for net in self.nets]).softmax(-1), self.gate(x).softmax(-1)
        if self.top:
            g_NM = F.one_hot(g_NM.argmax(-1), g_NM.shape[-1]).to(g_NM)
        return torch.einsum("nm,mnk->nk", g_NM, p_MNK)


class Stacking(nn.Module):
    """Networks, and a linear layer on all of their logits."""

    def __init__(self, nets: Nets, classes: int) -> None:
        super().__init__()
        self.nets, self.head = nn.ModuleList(nets), nn.Linear(len(nets) * classes, classes)
        noise = torch.randn(classes, len(nets) * classes, generator=torch.Generator().manual_seed(0))
        self.head.weight.data = torch.eye(classes).repeat(1, len(nets)) + 0.1 * noise

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([net(x) for net in self.nets], 1))


class Routine(nn.Module):
    """What torch-uncertainty's routine makes of the rows of all members: their mean probability."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).unflatten(0, (-1, len(x))).softmax(-1).mean(0)


@dataclass(frozen=True)
class Kind:
    """A kind of ensemble: what makes it of networks, what a user writes to look inside, and what gives its scores.

    ``draws`` is the number of fresh answers over which a random one is attacked and judged.
    """

    make: Callable[[Nets, Training], nn.Module]
    code: str
    scores: Callable[[Any], nn.Module] = nn.Module.eval
    draws: int = 1

    @property
    def lines(self) -> int:
        return len(self.code.splitlines())


def counts(z_MNK: Tensor) -> Tensor:
    return F.one_hot(z_MNK.argmax(-1), z_MNK.shape[-1]).to(z_MNK.dtype)


def abstained(z_MNK: Tensor) -> Tensor:
    share_NK = counts(z_MNK).mean(0)
    return torch.cat([share_NK, (share_NK.amax(1, keepdim=True) < 0.6).to(z_MNK.dtype) * 2], 1)


def cascaded(z_MNK: Tensor) -> Tensor:
    scores_NK = z_MNK[-1]
    for z_NK in z_MNK.flip(0)[1:]:
        scores_NK = torch.where(z_NK.softmax(-1).amax(-1, keepdim=True) >= 0.9, z_NK, scores_NK)
    return scores_NK


def surest(z_MNK: Tensor) -> Tensor:
    chosen_N = z_MNK.softmax(-1).amax(-1).argmax(0)
    return z_MNK[chosen_N, torch.arange(len(chosen_N))]


def of_weights(z_MNK: Tensor) -> Tensor:
    return torch.einsum("m,mnk->nk", torch.tensor(WEIGHTS, dtype=z_MNK.dtype), z_MNK)


def ruled(rule: Callable[[Tensor], Tensor], vote: str) -> Kind:
    return Kind(lambda nets, data: Theirs(nets, rule), f"as_ensemble(model, 'nets', {vote})")


KINDS: dict[str, Kind] = {
    "mean probability": ruled(lambda z: z.softmax(-1).mean(0), "'softmax'"),
    "hard votes": ruled(lambda z: counts(z).sum(0), "'voting'"),
    "mean logits": ruled(lambda z: z.mean(0), "'logits'"),
    "weighted probability": ruled(lambda z: of_weights(z.softmax(-1)), "'softmax', weights=[3, 2, 1]"),
    "weighted votes": ruled(lambda z: of_weights(counts(z)), "'voting', weights=[3, 2, 1]"),
    "median": ruled(lambda z: z.median(0).values, "'median'"),
    "trimmed mean": ruled(lambda z: z.sort(0).values[1:-1].mean(0), "votes.trimmed(1)"),
    "largest probability": ruled(lambda z: z.softmax(-1).amax(0), "'max'"),
    "product of experts": ruled(lambda z: z.log_softmax(-1).sum(0), "'product'"),
    "Borda": ruled(lambda z: z.argsort(-1).argsort(-1).to(z.dtype).sum(0), "'borda'"),
    "most decided member": ruled(surest, "'decided'"),
    "cascade": ruled(cascaded, "votes.cascade(0.9)"),
    "abstaining": ruled(abstained, "votes.abstaining(0.6)"),
    "a vote of its own": ruled(lambda z: z.softmax(-1).pow(0.5).sum(0), "lambda z: z.softmax(-1).pow(0.5).sum(0)"),
    "a list of networks": Kind(
        lambda nets, data: nn.ModuleList(nets),
        "as_ensemble(model)",
        lambda nets: Theirs(list(nets), lambda z: z.softmax(-1).mean(0)),
    ),
    "unknown code": Kind(lambda nets, data: Theirs(nets, lambda z: z.softmax(-1).mean(0)), "as_ensemble(model, inputs=x)"),
    "views of one network": Kind(lambda nets, data: Views(nets[0]), "as_ensemble(model, member_logits=model.logits)"),
    "mixture of experts": Kind(
        lambda nets, data: Experts(nets, data.x, top=False), "as_ensemble(model, 'nets', votes.gated(model.gate))"
    ),
    "one expert by a gate": Kind(
        lambda nets, data: Experts(nets, data.x, top=True), "as_ensemble(model, 'nets', votes.gated(model.gate, top=1))"
    ),
    "stacking": Kind(
        lambda nets, data: Stacking(nets, int(data.y.max()) + 1), "as_ensemble(model, 'nets', votes.stacked(model.head))"
    ),
    "randomised smoothing": Kind(
        lambda nets, data: Smoothing(nets[0]), f"votes.smoothed(model.net, {SIGMA}, {COPIES})", draws=5
    ),
    "a member drawn at random": Kind(
        lambda nets, data: Lottery(nets), f"RandomizedEnsemble(model.nets, {list(PROBABILITIES)})", draws=10
    ),
    "DataParallel": Kind(lambda nets, data: nn.DataParallel(as_ensemble(nets, vote="voting")), "as_ensemble(model)"),
}


def of_torchensemble(name: str, **settings: str) -> Kind:
    def make(nets: Nets, data: Training) -> nn.Module:
        kind = getattr(importlib.import_module("torchensemble"), name)
        model = kind(estimator=nets[0], n_estimators=len(nets), cuda=False, **settings)
        model.estimators_.extend(nets)
        return model

    return Kind(make, "as_ensemble(model)")


def deep(nets: Nets, data: Training) -> nn.Module:
    return importlib.import_module("torch_uncertainty.methods").deep_ensembles(nets)


def collected(nets: Nets, data: Training) -> nn.Module:
    library = importlib.import_module("torch_uncertainty.methods")
    collector = library.CheckpointCollector(nets[0], save_schedule=list(range(len(nets))))
    collector.saved_models.extend(copy.deepcopy(net) for net in nets[1:])
    collector.num_estimators += len(nets) - 1
    return collector


def averaged(nets: Nets, data: Training) -> nn.Module:
    return importlib.import_module("torch_uncertainty.methods").SWA(deep(nets, data), 0, 1)


KINDS |= {
    f"torchensemble {name}{' hard' if settings else ''}": of_torchensemble(name, **settings)
    for name, settings in [
        ("VotingClassifier", {}),
        ("VotingClassifier", {"voting_strategy": "hard"}),
        ("BaggingClassifier", {}),
        ("FusionClassifier", {}),
        ("SnapshotEnsembleClassifier", {}),
        ("FastGeometricClassifier", {}),
        ("GradientBoostingClassifier", {}),
        ("SoftGradientBoostingClassifier", {}),
        ("AdversarialTrainingClassifier", {}),
    ]
}
KINDS |= {
    f"torch-uncertainty {name}": Kind(make, "as_ensemble(model)", Routine)
    for name, make in {"deep_ensembles": deep, "CheckpointCollector": collected, "SWA": averaged}.items()
}
