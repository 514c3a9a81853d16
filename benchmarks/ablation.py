"""Which part of MORA does what: each taken away or changed alone, at the same budget of 5 x 100 steps.

    python -m benchmarks.ablation --dataset digits --eps 0.12 --out benchmarks/results/ablation
    python -m benchmarks.ablation --models standard_resnet20_3,trs_resnet20_3,dverge_resnet20_3,gal_resnet20_3 --eps 0.01 \\
        --data-dir DIR
    python -m benchmarks.ablation ... --variants decomposition --table-only

Robust accuracy (%), passes (forward + backward) per image, and, beside MORA as it is: how many images it alone leaves
robust, how many the variant alone, McNemar's exact p, and its lead in points with the 95% interval. A second table pools
them over the models, as if every model had images of its own. Goes on where it stopped: every variant on every model has a
record of its own, with one flag for each image. ``decomposition`` are the steps from the gradient of the vote to MORA:

- *gradient of the vote*: cross-entropy of the ensemble's own scores (of hard votes, what they pass straight through);
- *mean probability*, *soft votes*: the margin of a soft vote, the latter with each member's logits divided by its own gap;
- *normalised soft votes*: MORA without reweighed members (beta 0), untargeted, five restarts;
- *reweighing*: its sweep of betas, untargeted; *aiming* (MORA as it is): at the classes that came closest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.options import Benchmark, image_options, named
from benchmarks.records import Record, exact_p, lead_of, load, measured, paired, passes_of, robust_of
from benchmarks.tables import save_table
from defenses import load_model, model_card
from ensemble_attacks import MORA, Surrogate
from ensemble_attacks.attacks.base import DescentAttack
from ensemble_attacks.attacks.mora import mora
from ensemble_attacks.data import load_dataset
from ensemble_attacks.descent.objectives import Goal, Objective, cross_entropy, lead, of_scores
from ensemble_attacks.descent.stages import Stage
from ensemble_attacks.descent.steps import CosineSteps
from ensemble_attacks.models.view import Outputs
from ensemble_attacks.models.votes import Vote, vote_of

BETAS = (0.5, 0.0, 0.25, 0.75, 1.0)
SWEEP = len(BETAS)
MODELS = "standard_convnet_3,gal_convnet_3,trs_convnet_3,adp_convnet_3"
Make = Callable[..., DescentAttack]


class Restarted(DescentAttack):
    """An attack with MORA's steps on any objective, from random starts."""

    step_rule = CosineSteps

    def __init__(self, model: nn.Module, objective: Objective, *, eps: float, seed: int, steps: int) -> None:
        super().__init__("Restarted", model, norm="Linf", eps=eps, steps=steps, seed=seed, batch_size=None)
        self.objective = objective

    def _stages(self, num_classes: int) -> list[Stage]:
        return [Stage(self.objective, restart=restart) for restart in range(SWEEP)]


class Changed(MORA):
    """MORA with a part changed that is none of its settings."""

    masked: bool | None = None
    normalized = True
    short = True
    opened = True

    def sweep(self) -> list[tuple[float, int]]:
        return super().sweep() if self.short else [(beta, self.steps) for beta in self.betas]

    def _stages(self, num_classes: int) -> list[Stage]:
        return [stage if self.opened else replace(stage, opening=False) for stage in super()._stages(num_classes)]

    def _loss(self, beta: float, outputs: Outputs, goal: Goal, vote: Vote | None = None) -> Tensor:
        assert outputs.logits_MNK is not None
        vote = vote or vote_of(self.model)
        return mora(
            outputs.logits_MNK,
            outputs.scores_NK,
            goal,
            beta=beta,
            vote=vote if self.masked is None else replace(vote, masked=self.masked),
            tau=self.tau,
            rule=self.weight_rule,
            normalized=self.normalized,
        )


def changed(model: nn.Module, *, eps: float, seed: int, steps: int, **parts: Any) -> DescentAttack:
    attack = Changed(model, eps=eps, seed=seed, steps=steps)
    for name, value in parts.items():
        setattr(attack, name, value)
    return attack


def soft(surrogate: str) -> Make:
    return lambda model, **settings: Restarted(Surrogate(model, surrogate), of_scores(lead), **settings)


DEFAULT = "MORA"
DECOMPOSITION: dict[str, Make] = {
    "gradient of the vote": lambda model, **settings: Restarted(model, of_scores(cross_entropy), **settings),
    "mean probability": soft("probability"),
    "soft votes": soft("votes"),
    "normalised soft votes": partial(MORA, betas=(0.0,) * SWEEP, aimed=False),
    "reweighing": partial(MORA, betas=BETAS, aimed=False),
    DEFAULT: partial(MORA, betas=BETAS),
}
VARIANTS: dict[str, Make] = {
    **DECOMPOSITION,
    "published": partial(MORA.published, betas=BETAS),
    "released": partial(MORA.released, betas=BETAS),
    "no reweighing": partial(MORA, betas=BETAS, weight_rule="equal"),
    "no opening": partial(changed, opened=False),
    "no short descents": partial(changed, short=False),
    "no normalisation": partial(changed, normalized=False),
    "all masked": partial(changed, masked=True),
    "none masked": partial(changed, masked=False),
    **{f"beta {beta:g} alone": partial(MORA, betas=(beta,) * SWEEP) for beta in sorted(BETAS)},
    **{f"tau {tau:g}": partial(MORA, betas=BETAS, tau=tau) for tau in (0.1, 1.0, 5.0)},
    **{f"weights: {rule}": partial(MORA, betas=BETAS, weight_rule=rule) for rule in ("published", "runner-up", "code")},
}


def row_of(model: str, vote: str, variant: str, record: Record, default: Record | None) -> dict[str, Any]:
    row = {"model": model, "vote": vote, "variant": variant, "n": record["n"]}
    row |= {"robust": robust_of([record]), "passes": passes_of([record])}
    if default is None:
        return row | dict.fromkeys(("MORA's alone", "its alone", "p", "MORA's lead"))
    ours, theirs, p = paired(default["flags"], record["flags"])
    lead = lead_of(ours, theirs, record["n"])
    return row | {"MORA's alone": ours, "its alone": theirs, "p": f"{p:.3f}", "MORA's lead": lead}


def pooled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each vote and variant what it loses to MORA over all models that both were run on, images pooled."""
    found = []
    for vote, variant in dict.fromkeys((row["vote"], row["variant"]) for row in rows):
        same = [row for row in rows if (row["vote"], row["variant"]) == (vote, variant) and row["p"] is not None]
        if variant == DEFAULT or not same:
            continue
        n, ours, theirs = (sum(row[key] for row in same) for key in ("n", "MORA's alone", "its alone"))
        row = {"vote": vote, "variant": variant, "models": len(same), "n": n, "MORA's alone": ours, "its alone": theirs}
        found.append(row | {"p": f"{exact_p(ours, theirs):.3f}", "MORA's lead": lead_of(ours, theirs, n)})
    return found


def name_of(model: str, vote: str, variant: str) -> str:
    return "_".join((model, vote, variant.replace(" ", "-").replace(":", "").replace(",", ""))) + ".json"


@click.command(cls=Benchmark)
@click.option("--models", default=MODELS, show_default=True, help="Comma-separated.")
@click.option("--votes", default="voting,softmax", show_default=True)
@click.option("--variants", default="all", show_default=True, help="all, decomposition, or names, comma-separated.")
@click.option("--steps", default=100, show_default=True, help="Of each of the five descents.")
@click.option("--table-only", is_flag=True, help="Run nothing, print what is there.")
@image_options("runs/ablation")
def main(
    models: str,
    votes: str,
    variants: str,
    steps: int,
    table_only: bool,
    model_dir: str | None,
    dataset: str,
    data_dir: str,
    eps: float,
    n: int,
    seed: int,
    out: Path,
) -> None:
    torch.backends.cudnn.allow_tf32 = False
    groups = {"all": VARIANTS, "decomposition": DECOMPOSITION}
    chosen = list(groups.get(variants) or named(variants, VARIANTS, "--variants"))
    cells = [(model, vote) for model in models.split(",") for vote in votes.split(",")]
    about: dict[str, Any] = {"dataset": dataset, "steps": steps}
    if not table_only:
        x, y = load_dataset(dataset, data_dir=data_dir, n=n)
    for variant in chosen if not table_only else ():
        for model, vote in cells:
            net = load_model(model, model_dir, dataset, vote=vote)
            make = partial(VARIANTS[variant], eps=eps, seed=seed, steps=steps)
            told = about | {"model": model, "vote": vote, "variant": variant}
            told |= {"weights": model_card(model, model_dir, dataset)["sha256"]}
            path = out / dataset / name_of(model, vote, variant)
            record = measured(path, net, x, y, make, eps=eps, seed=seed, about=told)
            click.echo(f"{model} {vote} {variant}: {robust_of([record]):.1f}, {passes_of([record]):.1f} passes", err=True)
    rows = rows_of(out / dataset, cells, chosen)
    if not rows:
        raise click.UsageError(f"{out / dataset} holds nothing yet")
    name = dataset if variants == "all" else f"{dataset}_{variants.partition(',')[0]}"
    click.echo(save_table(rows, out / name))
    if together := pooled(rows):
        click.echo(save_table(together, out / f"{name}_pooled"))


def rows_of(folder: Path, cells: list[tuple[str, str]], variants: list[str]) -> list[dict[str, Any]]:
    """Return a row for each record that is there."""
    rows = []
    for model, vote in cells:
        found = {v: load(path) for v in variants if (path := folder / name_of(model, vote, v)).exists()}
        default = found.get(DEFAULT)
        rows += [row_of(model, vote, variant, record, default) for variant, record in found.items()]
    return rows


if __name__ == "__main__":
    main()
