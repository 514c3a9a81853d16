"""Kinds of ensembles, as somebody else's code puts them together: what it takes to look inside, and what is found then.

    python -m benchmarks.kinds --dataset digits --models standard_convnet_3 --eps 0.12 --out runs/kinds
    python -m benchmarks.kinds --dataset cifar10 --models public_resnet20,public_at_resnet20,public_resnet32 \
        --model-dir MODELS --eps 0.00392 --n 64 --steps 10 --out runs/kinds

For each kind: the lines of a user's code that make it an ensemble which attacks look into, whose predictions on the clean
images have to be the original's; and the share (%) that stays robust to APGD-CE (pyautoattack) on the model's own scores, to
the better of two plain surrogates (our APGD on the members' mean logits, and on their mean probability), and to MORA with
one beta. Each attack has ``--steps`` steps, and its passes per image are counted; ours leave a sample once it is fooled. All
images are judged by plain forward passes of the original, several of a random one, which is attacked over as many draws.
APGD-CE stops with an error on scores that have no gradient. Most kinds are made of given networks (``kinds_given``), others
are trained on the spot (``kinds_trained``); those of torchensemble and torch-uncertainty are left out, and said to be, where
these are not installed (``kinds-requirements.txt``). The same command goes on where it was stopped.
"""

from __future__ import annotations

import copy
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks import kinds_given, kinds_trained
from benchmarks.kinds_given import Kind, Nets, Training
from benchmarks.options import Benchmark, file_name, image_options, named
from benchmarks.tables import save_table
from defenses.randomized import RandomizedEnsemble
from ensemble_attacks import APGD, MORA, CrossMaxTransfer, as_ensemble, votes
from ensemble_attacks.data import load_dataset
from ensemble_attacks.hosts.original import installed_autoattack
from ensemble_attacks.models.passes import count_passes
from ensemble_attacks.models.providers import load_model
from ensemble_attacks.names import outermost

KINDS: dict[str, Kind] = {**kinds_given.KINDS, **kinds_trained.KINDS}
KNOWN = {"as_ensemble": as_ensemble, "votes": votes, "RandomizedEnsemble": RandomizedEnsemble}  # to a user's lines


@torch.no_grad()
def right(scores: nn.Module, x: Tensor, y: Tensor, draws: int = 1) -> float:
    """Return the share (%) that plain forward passes get right, the mean over ``draws`` of them."""
    return 100 * torch.stack([scores(x).argmax(1) == y for _ in range(draws)]).double().mean().item()


def measured(
    kind: Kind, nets: Nets, data: Training, x: Tensor, y: Tensor, eps: float, steps: int, seed: int
) -> dict[str, Any]:
    """Return a row of the table."""
    torch.manual_seed(seed)
    model = kind.make(copy.deepcopy(nets), data).eval()
    scores = kind.scores(model).eval()
    ensemble = eval(kind.code, {"model": model, "x": x, **KNOWN}).eval()
    row: dict[str, Any] = {"lines": kind.lines, "recognised": getattr(ensemble, "found", "")}
    row |= {"clean": right(scores, x, y, kind.draws), "clean, inside": right(ensemble, x, y, kind.draws)}
    draws = kind.draws if kind.draws > 1 else None

    def attacked(target: nn.Module, attack: Callable[[Any], Tensor]) -> tuple[float, float]:
        counted = count_passes(target)
        robust = right(scores, attack(counted), y, kind.draws)
        return robust, (counted.forwards + counted.backwards) / len(x)

    def original(net: nn.Module) -> Tensor:
        package = importlib.import_module(f"{installed_autoattack().__name__}.autopgd_base")
        settings: dict[str, Any] = {"n_iter": steps, "n_restarts": 1, "eps": eps, "seed": seed, "eot_iter": kind.draws}
        return package.APGDAttack(net, norm="Linf", device="cpu", **settings).perturb(x, y)

    def ours(attack: Any) -> Tensor:
        attack.eot_iter = draws
        return attack(x, y)

    def transferred(surrogate: str) -> tuple[float, float]:
        settings: dict[str, Any] = {"eps": eps, "steps": steps, "n_restarts": 1, "seed": seed}
        return attacked(ensemble, lambda net: ours(CrossMaxTransfer(net, APGD, surrogate, refine=None, **settings)))

    try:
        row["APGD-CE"], row["passes, APGD-CE"] = attacked(scores, original)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        row["APGD-CE"], row["passes, APGD-CE"] = "no gradient", 0.0
    surrogates = [transferred(surrogate) for surrogate in ("mean", "probability")]
    row["surrogate"], row["passes, surrogate"] = min(surrogates)
    found = attacked(ensemble, lambda net: ours(MORA(net, eps=eps, steps=steps, betas=(0.5,), seed=seed)))
    row["MORA"], row["passes, MORA"] = found
    return row


def networks_of(model: nn.Module) -> list[nn.Module]:
    """Return the members of an ensemble, or a network alone."""
    members = getattr(model, "members", None)
    return list(members) if isinstance(members, nn.ModuleList) else [model]


@click.command(cls=Benchmark)
@click.option("--models", default="standard_convnet_3", show_default=True, help="Whose members are taken, comma-separated.")
@click.option("--kinds", default=",".join(KINDS), help="Comma-separated.  [default: all]")
@click.option("--steps", default=50, show_default=True, help="Of each attack.")
@click.option("--train", default=1000, show_default=True, help="Images that some kinds are trained on.")
@image_options("runs/kinds")
def main(
    models: str,
    kinds: str,
    steps: int,
    train: int,
    model_dir: str | None,
    dataset: str,
    data_dir: str,
    eps: float,
    n: int,
    seed: int,
    out: Path,
) -> None:
    summary = {"models": models, "dataset": dataset, "eps": eps, "n": n, "steps": steps, "seed": seed, "train": train}
    table, about = out / file_name(dataset), out / f"{file_name(dataset)}.summary.json"
    x, y = load_dataset(dataset, data_dir=data_dir, n=n)
    images, labels = load_dataset(dataset, "train", data_dir=data_dir)
    data = Training(images[:train], labels[:train], seed)
    nets = [net for name in outermost(models, ",") for net in networks_of(load_model(name, model_dir, dataset))][:3]
    known = about.is_file() and json.loads(about.read_text()) == summary
    rows: list[dict[str, Any]] = json.loads(table.with_suffix(".json").read_text()) if known else []
    for name in named(kinds, KINDS, "--kinds"):
        if any(row["kind"] == name for row in rows):
            continue
        began = time.perf_counter()
        try:
            rows.append({"kind": name, **measured(KINDS[name], nets, data, x, y, eps, steps, seed)})
        except ImportError as error:
            click.echo(f"left out: {name} ({error})", err=True)
            continue
        said = {key: value for key, value in rows[-1].items() if key != "recognised"}
        click.echo(f"{said} {time.perf_counter() - began:.0f} s", err=True)
        text = save_table(rows, table)
        about.write_text(json.dumps(summary, indent=2) + "\n")
    click.echo(f"{models}, {dataset}: Linf {eps:g}, n = {n}, {steps} steps, seed {seed}\n")
    click.echo(text if rows else "no kind was run")


if __name__ == "__main__":
    main()
