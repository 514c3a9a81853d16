"""Our attacks inside AttackBench (Cinà et al., AAAI 2025), whose judge, budget and score are not ours, beside its own.

    pip install attackbenchlib foolbox
    python -m benchmarks.attackbench --n 20

The score, local optimality, is 1 for an attack that finds the nearest adversarial image of each sample, as far as any of the
attacks entered here has found one, within 2000 forward and backward passes of a sample: it is relative to these attacks.
Ours are searches for the smallest radius (`MinimalNorm`), with settings chosen for that budget beforehand.

AttackBench counts, tracks and limits what goes through its own model, which hides an ensemble's members. Attacks that look
at them are given those of the same forward pass, and no more is shown of a sample once its budget is spent (`Inside`). So
every pass is counted, ours as theirs, and so are the few that check a model before an attack.

The members are those of `benchmarks.truth`; nothing is downloaded, and no account is needed.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.options import Benchmark, named
from benchmarks.tables import save_table
from benchmarks.truth import VOTES, Cell
from ensemble_attacks import APGD, MORA, PGD, PMA, Ensemble, MinimalNorm
from ensemble_attacks.data import load_dataset
from ensemble_attacks.evaluation.identity import code_version
from ensemble_attacks.files import write_whole

BUDGET = 2000  # AttackBench's: forward and backward passes of a sample
LARGEST = 0.5  # radius up to which ours search


class Shown(Ensemble):
    """An ensemble that keeps what it last saw of its members, and said."""

    def forward(self, x: Tensor) -> Tensor:
        self.logits_MNK = self.member_logits(x)
        self.scores_NK = self.aggregate(self.logits_MNK)
        return self.scores_NK


class Inside(nn.Module):
    """The members of a `Shown` ensemble, as AttackBench's model around it lets them be seen."""

    def __init__(self, bench: Any) -> None:
        super().__init__()
        self.bench, self.shown = bench, bench.model
        self.vote = self.shown.vote

    def member_logits(self, x: Tensor) -> Tensor:
        self.shown.scores_NK = None
        scores_NK = self.bench(x)
        members = len(self.shown.members)
        if self.shown.scores_NK is None:  # nobody may ask any more
            return scores_NK.expand(members, *scores_NK.shape)
        spent_N = (scores_NK != self.shown.scores_NK).any(1)
        logits_MNK = torch.where(spent_N.view(1, -1, 1), scores_NK.expand_as(self.shown.logits_MNK), self.shown.logits_MNK)
        return logits_MNK + 0 * scores_NK  # a backward pass is counted where it goes through the scores

    def aggregate(self, logits_MNK: Tensor) -> Tensor:
        return self.shown.aggregate(logits_MNK)

    def forward(self, x: Tensor) -> Tensor:
        return self.bench(x)


def ours(make: Callable[[nn.Module], Any], inside: bool = False) -> Callable[..., Tensor]:
    def attack(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        return MinimalNorm(make(Inside(model) if inside else model))(inputs, labels)

    return attack


OURS = {
    "MORA": ours(lambda model: MORA(model, eps=LARGEST, betas=(0.5,)), inside=True),
    "PGD on the margin": ours(lambda model: PGD(model, eps=LARGEST, n_restarts=1, loss="margin")),
    "PMA": ours(lambda model: PMA(model, eps=LARGEST)),
    "APGD": ours(lambda model: APGD(model, eps=LARGEST)),
}
THEIRS = ("fmn", "fab", "apgd_minimal", "apgd_t_minimal", "tr", "pgd")


def theirs(name: str) -> Callable[..., Tensor]:
    """Return an attack of AttackBench, with its own settings in Linf."""
    from attackbench.attacks.original import configs

    if name == "pgd":
        from attackbench.preconfigured import pgd

        return pgd
    settings = getattr(configs, f"original_{name}_linf" if name == "fmn" else f"original_{name}")()
    settings = {key: value for key, value in settings.items() if key not in ("name", "source")}
    return getattr(configs, f"get_original_{name}")(**settings | {"threat_model": "linf"})


def ran(model: Shown, x: Tensor, y: Tensor, name: str) -> dict[str, Any]:
    """Return AttackBench's results of an attack."""
    import attackbench

    attack = OURS[name] if name in OURS else theirs(name)
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one for every pass beyond the budget
        found = attackbench.run_attack(
            model,
            loader,
            attackbench.create_custom_attack(attack, attack_name=name) if name in OURS else attack,
            "linf",
            device=torch.device("cpu"),
            query_budget=BUDGET,
            dataset_name="digits",
            model_name="ensemble",
            attack_name=name,
            attack_lib="ours" if name in OURS else "original",
        )
    if any(found["batch_failures"]):
        raise RuntimeError(f"{name} raised inside AttackBench, which would count every image as unbroken")
    return found


@click.command(cls=Benchmark)
@click.option("--members", default="plain", show_default=True)
@click.option("--vote", default="softmax", show_default=True)
@click.option("--attacks", default=",".join((*OURS, *THEIRS)), show_default=True)
@click.option("--n", default=20, show_default=True, help="Test images.")
@click.option("--models", type=click.Path(path_type=Path), default=Path("runs/truth"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/attackbench"), show_default=True)
def main(members: str, vote: str, attacks: str, n: int, models: Path, out: Path) -> None:
    os.environ.setdefault("WANDB_MODE", "offline")
    try:
        from attackbench.metrics.optimality import compute_local_optimality
    except ImportError as error:
        raise click.UsageError(f"{error}: pip install attackbenchlib foolbox") from error
    named(vote, VOTES, "--vote")
    torch.set_num_threads(1)
    x, y = load_dataset("digits", n=n)
    cell = Cell(models, members, 0.0, 0)
    runs: dict[str, dict[str, Any]] = {}
    for name in named(attacks, (*OURS, *THEIRS), "--attacks"):
        path = out / f"{members}_{vote}_{n}_{name.replace(' ', '-')}.json"
        if not path.exists():
            found = ran(Shown(cell.members, vote).eval(), x, y, name)
            out.mkdir(parents=True, exist_ok=True)
            kept = ("distances", "correct", "adv_success", "num_forwards", "num_backwards", "batch_failures", "metadata")
            about = {"attack": name, "weights": cell.about["weights"], "code": code_version(), "n": n}
            content = about | {key: found[key] for key in kept if key in found}
            write_whole(path, json.dumps(content, default=str).encode() + b"\n")
            click.echo(f"{name} done", err=True)
        runs[name] = json.loads(path.read_text())
    rows = []
    for name, run in runs.items():
        distance = torch.tensor([float(d) for d in run["distances"]["linf"]], dtype=torch.double)
        score = compute_local_optimality(run, reference_results=list(runs.values()), threat_model="linf", use_wandb=False)
        passes = [a + b for a, b in zip(run["num_forwards"], run["num_backwards"], strict=True)]
        rows.append(
            {
                **{"members": members, "vote": vote, "n": n, "attack": name, "whose": "ours" if name in OURS else "theirs"},
                "optimality": f"{score['optimality']:.3f}",
                "median distance": f"{distance.median():.4f}",
                "unbroken": int((~distance.isfinite()).sum()),
                "passes": sum(passes) / n,
            }
        )
    rows.sort(key=lambda row: row["optimality"], reverse=True)
    click.echo(save_table(rows, out / f"{members}_{vote}_{n}"))


if __name__ == "__main__":
    main()
