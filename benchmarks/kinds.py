"""Kinds of ensembles, as somebody else's code puts them together: what it takes to look inside, and what is found then.

    python -m benchmarks.kinds --dataset digits --models standard_convnet_3 --eps 0.12 --out runs/kinds

For each kind: the lines of a user's code that make it an ensemble which attacks look into, whose predictions on the clean
images have to be the original's; and the share (%) that stays robust to APGD-CE (pyautoattack) on the model's own scores, to
the better of two plain surrogates (our APGD on the members' mean logits, and on their mean probability), and to MORA with
one beta. Each attack has ``--steps`` steps, and its passes per image are counted; ours leave a sample once it is fooled. All
images are judged by a plain forward pass of the original. APGD-CE stops with an error on scores that have no gradient. Kinds
of torchensemble and torch-uncertainty are left out, and said to be, where these are not installed.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.options import file_name, image_options, members_of, named
from benchmarks.tables import save_table
from ensemble_attacks import APGD, MORA, CrossMaxTransfer, as_ensemble, votes
from ensemble_attacks.data import load_dataset
from ensemble_attacks.hosts.original import installed_autoattack
from ensemble_attacks.models.passes import count_passes

Nets = list[nn.Module]
WEIGHTS = (3.0, 2.0, 1.0)


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


class Routine(nn.Module):
    """What torch-uncertainty's routine makes of the rows of all members: their mean probability."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).unflatten(0, (-1, len(x))).softmax(-1).mean(0)


@dataclass(frozen=True)
class Kind:
    """A kind of ensemble: what makes it of networks, what a user writes to look inside, and what gives its scores."""

    make: Callable[[Nets], nn.Module]
    code: str
    scores: Callable[[Any], nn.Module] = nn.Module.eval

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
    return Kind(lambda nets: Theirs(nets, rule), f"as_ensemble(model, 'nets', {vote})")


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
        lambda nets: nn.ModuleList(nets),
        "as_ensemble(model)",
        lambda nets: Theirs(list(nets), lambda z: z.softmax(-1).mean(0)),
    ),
    "unknown code": Kind(lambda nets: Theirs(nets, lambda z: z.softmax(-1).mean(0)), "as_ensemble(model, inputs=x)"),
    "views of one network": Kind(lambda nets: Views(nets[0]), "as_ensemble(model, member_logits=model.logits)"),
    "DataParallel": Kind(lambda nets: nn.DataParallel(as_ensemble(nets, vote="voting")), "as_ensemble(model)"),
}


def of_torchensemble(name: str, **settings: str) -> Kind:
    def make(nets: Nets) -> nn.Module:
        kind = getattr(importlib.import_module("torchensemble"), name)
        model = kind(estimator=nets[0], n_estimators=len(nets), cuda=False, **settings)
        model.estimators_.extend(nets)
        return model

    return Kind(make, "as_ensemble(model)")


def deep(nets: Nets) -> nn.Module:
    return importlib.import_module("torch_uncertainty.methods").deep_ensembles(nets)


def collected(nets: Nets) -> nn.Module:
    library = importlib.import_module("torch_uncertainty.methods")
    collector = library.CheckpointCollector(nets[0], save_schedule=list(range(len(nets))))
    collector.saved_models.extend(copy.deepcopy(net) for net in nets[1:])
    collector.num_estimators += len(nets) - 1
    return collector


def averaged(nets: Nets) -> nn.Module:
    return importlib.import_module("torch_uncertainty.methods").SWA(deep(nets), 0, 1)


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


@torch.no_grad()
def right(scores: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share (%) that a plain forward pass gets right."""
    return 100 * (scores(x).argmax(1) == y).double().mean().item()


def measured(kind: Kind, nets: Nets, x: Tensor, y: Tensor, eps: float, steps: int, seed: int) -> dict[str, Any]:
    """Return a row of the table."""
    model = kind.make(copy.deepcopy(nets)).eval()
    scores = kind.scores(model).eval()
    ensemble = eval(kind.code, {"model": model, "x": x, "as_ensemble": as_ensemble, "votes": votes}).eval()
    row: dict[str, Any] = {"lines": kind.lines, "recognised": getattr(ensemble, "found", "")}
    row |= {"clean": right(scores, x, y), "clean, inside": right(ensemble, x, y)}

    def attacked(target: nn.Module, attack: Callable[[Any], Tensor]) -> tuple[float, float]:
        counted = count_passes(target)
        robust = right(scores, attack(counted), y)
        return robust, (counted.forwards + counted.backwards) / len(x)

    def original(net: nn.Module) -> Tensor:
        package = importlib.import_module(f"{installed_autoattack().__name__}.autopgd_base")
        attack = package.APGDAttack(net, n_iter=steps, norm="Linf", n_restarts=1, eps=eps, seed=seed, device="cpu")
        return attack.perturb(x, y)

    def transferred(surrogate: str) -> tuple[float, float]:
        settings: dict[str, Any] = {"eps": eps, "steps": steps, "n_restarts": 1, "seed": seed}
        return attacked(ensemble, lambda net: CrossMaxTransfer(net, APGD, surrogate, refine=None, **settings)(x, y))

    try:
        row["APGD-CE"], row["passes, APGD-CE"] = attacked(scores, original)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        row["APGD-CE"], row["passes, APGD-CE"] = "no gradient", 0.0
    surrogates = [transferred(surrogate) for surrogate in ("mean", "probability")]
    row["surrogate"], row["passes, surrogate"] = min(surrogates)
    found = attacked(ensemble, lambda net: MORA(net, eps=eps, steps=steps, betas=(0.5,), seed=seed)(x, y))
    row["MORA"], row["passes, MORA"] = found
    return row


@click.command()
@click.option("--models", default="standard_convnet_3", show_default=True, help="Whose members are taken, comma-separated.")
@click.option("--kinds", default=",".join(KINDS), help="Comma-separated.  [default: all]")
@click.option("--steps", default=50, show_default=True, help="Of each attack.")
@image_options("runs/kinds")
def main(
    models: str,
    kinds: str,
    steps: int,
    model_dir: str | None,
    dataset: str,
    data_dir: str,
    eps: float,
    n: int,
    seed: int,
    out: Path,
) -> None:
    torch.manual_seed(seed)
    x, y = load_dataset(dataset, data_dir=data_dir, n=n)
    nets = members_of(models, model_dir, dataset)[:3]
    rows: list[dict[str, Any]] = []
    for name in named(kinds, KINDS, "--kinds"):
        try:
            rows.append({"kind": name, **measured(KINDS[name], nets, x, y, eps, steps, seed)})
        except ImportError as error:
            click.echo(f"left out: {name} ({error})", err=True)
            continue
        click.echo({key: value for key, value in rows[-1].items() if key != "recognised"}, err=True)
    click.echo(f"{models}, {dataset}: Linf {eps:g}, n = {n}, {steps} steps, seed {seed}\n")
    click.echo(save_table(rows, out / file_name(dataset)))
    summary = {"models": models, "dataset": dataset, "eps": eps, "n": n, "steps": steps, "seed": seed}
    (out / f"{file_name(dataset)}.summary.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
