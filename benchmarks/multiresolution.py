"""'Ensemble everything everywhere': what its randomness and its CrossMax are worth, and what attacks leave of it.

    python -m benchmarks.multiresolution --model multiresolution_resnet18_1 --data-dir DIR --n 50
    python -m benchmarks.multiresolution ... --table-only

The defense draws anew in every forward pass, so all is judged by ten fresh draws of each image: *mean* is the share of right
draws, *in all of 10* that of images that are right in every one. Four tables:

- *attacks* on the defense as it is, each of about as many gradients, steps x draws, and AutoAttack's rand (20 draws a step;
  ``--suite-steps`` instead of its 100), by its own log and judged, beside the others on its images;
- *ablation*: EOTAPGD on the defense, with its draws frozen, with the mean of the logits instead of CrossMax, and with both;
- *costs*: the transfer from the mean, with as many gradients in many steps or in many draws;
- *knobs*: the strength of the noise, the resolutions (in place of the coarsest, one that stays), and CrossMax's k, changed
  on the weights as they are, under shorter attacks.

Goes on where it stopped: every attack on every variant has a record, with each image's share of right draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.options import Benchmark, file_name, image_options, named
from benchmarks.records import Record, as_flags, load, measured, passes_of
from benchmarks.tables import save_table
from defenses import load_model, model_card
from defenses.multiresolution import Multiresolution
from ensemble_attacks import EOTAPGD, LAFEAT, MORA, CrossMaxTransfer, Surrogate
from ensemble_attacks.data import load_dataset
from ensemble_attacks.hosts.original import run_autoattack
from ensemble_attacks.judge import wilson_interval

DRAWS = 10  # by which the judge decides
LOOKS = 5  # draws of a step, where nothing else is said
COSTS = (1, 5, 20)  # draws of a step, in the table of costs
RAND, RAND_LOOKS = "AutoAttack rand", 20
OWN_LOG, JUDGED = f"{RAND}, by its own log", f"{RAND}, judged"


class Mean(nn.Module):
    """The mean of the members' logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.surrogate = Surrogate(model, "mean")
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.surrogate(x)


@dataclass(frozen=True)
class Variant:
    """The defense with a part changed, on the same weights.

    Attributes:
        frozen: whether every pass makes the same draws.
        mean: whether the mean of the logits stands in for CrossMax.
        noise: what the noise's strengths are multiplied by.
        coarse: how many of the coarsest resolutions the next finer one takes the place of.
        k: CrossMax's rank; ``None``: the defense's own.
    """

    frozen: bool = False
    mean: bool = False
    noise: float = 1.0
    coarse: int = 0
    k: int | None = None

    def of(self, model: nn.Module, seed: int) -> nn.Module:
        """Return a self-ensemble, or a group of them, changed; the ``seed`` is that of frozen draws."""
        for index, part in enumerate(module for module in model.modules() if isinstance(module, Multiresolution)):
            stack: Any = part.stack
            kept = stack.resolutions[: len(stack.resolutions) - self.coarse]
            stack.resolutions = kept + kept[-1:] * self.coarse
            stack.down_noise, stack.up_noise = self.noise * stack.down_noise, self.noise * stack.up_noise
            part.k = self.k or part.k
            part.frozen_at = seed + index if self.frozen else None
        return Mean(model) if self.mean else model


AS_IT_IS = "as it is"
ABLATION = {
    AS_IT_IS: Variant(),
    "draws frozen": Variant(frozen=True),
    "mean": Variant(mean=True),
    "mean, draws frozen": Variant(frozen=True, mean=True),
}
KNOBS = {
    **{f"noise x {noise:g}": Variant(noise=noise) for noise in (0.0, 0.5, 2.0)},
    **{f"coarsest {coarse} left out": Variant(coarse=coarse) for coarse in (1, 2)},
    **{f"k = {k}": Variant(k=k) for k in (2, 4)},
}
VARIANTS = ABLATION | KNOBS


def nothing(model: nn.Module, *, steps: int, eot_iter: int, **settings: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: x


class Rand:
    """AutoAttack's rand, which keeps what its own log says of each image."""

    def __init__(self) -> None:
        self.own = ""

    def make(
        self, model: nn.Module, *, steps: int, eot_iter: int, eps: float, seed: int
    ) -> Callable[[Tensor, Tensor], Tensor]:
        settings: dict[str, Any] = {"eps": eps, "seed": seed, "steps": steps, "version": "rand"}

        def attack(x: Tensor, y: Tensor) -> Tensor:
            images, flags = run_autoattack(model, x, y, batch_size=len(x), **settings)
            self.own += as_flags(list(flags.values())[-1])
            return images

        return attack


def refined(model: nn.Module, *, steps: int, **settings: Any) -> CrossMaxTransfer:
    return CrossMaxTransfer(model, steps=steps, refine_steps=steps, **settings)


ATTACKS: dict[str, Callable[..., Any]] = {
    "none": nothing,
    "EOTAPGD": EOTAPGD,
    "transfer": partial(CrossMaxTransfer, refine=None),
    "transfer, refined": refined,
    "LAFEAT": LAFEAT,
    "MORA": MORA,
}


@dataclass(frozen=True)
class Case:
    """An attack on a variant: each of so many steps is the mean of so many draws (of LAFEAT and MORA, of each descent)."""

    variant: str
    attack: str
    steps: int
    looks: int

    @property
    def budget(self) -> str:
        return f"{self.steps} x {self.looks}" if self.steps else ""

    def path(self, folder: Path) -> Path:
        return folder / file_name(f"{self.variant} {self.attack} {self.steps}x{self.looks}.json".replace(" = ", ""))


@dataclass(frozen=True)
class Plan:
    """What each table is made of.

    Attributes:
        gradients: steps x draws of an attack.
        sweep: the same of those in the table of knobs.
        suite: steps of AutoAttack's rand.
    """

    gradients: int = 100
    sweep: int = 20
    suite: int = 12

    def cases(self) -> dict[str, list[Case]]:
        """Return the attacks of each table."""
        many, few = Case(AS_IT_IS, "EOTAPGD", self.gradients // LOOKS, LOOKS), (self.gradients // 10, 2)
        return {
            "attacks": [
                Case(AS_IT_IS, "none", 0, 0),
                many,
                replace(many, attack="transfer"),
                Case(AS_IT_IS, RAND, self.suite, RAND_LOOKS),
                replace(many, attack="transfer, refined"),
                *(Case(AS_IT_IS, attack, *few) for attack in ("MORA", "LAFEAT")),
            ],
            "ablation": [Case(name, "EOTAPGD", many.steps, 1 if v.frozen else LOOKS) for name, v in ABLATION.items()],
            "costs": [Case(AS_IT_IS, "transfer", self.gradients // looks, looks) for looks in COSTS],
            "knobs": [
                Case(name, attack, self.sweep // 2, 2) for attack in ("transfer", "EOTAPGD") for name in (AS_IT_IS, *KNOBS)
            ],
        }


def rows_of(folder: Path, table: str, plan: Plan) -> list[dict[str, Any]]:
    """Return the rows of a table from the records that are there."""
    found = {case: load(case.path(folder)) for case in plan.cases()[table] if case.path(folder).exists()}
    if table == "attacks":
        return attack_rows(found)
    rows: dict[str, dict[str, Any]] = {}
    for case, record in found.items():
        variant = VARIANTS[case.variant]
        about: dict[str, Any] = {"variant": case.variant}
        if table == "ablation":
            about = {"CrossMax": "no" if variant.mean else "yes", "draws": "frozen" if variant.frozen else "fresh"}
        elif table == "costs":
            about = {"steps": case.steps, "draws": case.looks}
        row = rows.setdefault(str(about), about | {"n": record["n"], "clean": mean(record, "clean")})
        row[case.attack] = mean(record)
    return list(rows.values())


def attack_rows(found: dict[Case, Record]) -> list[dict[str, Any]]:
    shared = min((record["n"] for record in found.values()), default=0)
    rows = []
    for case, record in found.items():
        judged = right(record)
        verdicts: dict[str, list[float]] = {case.attack: judged}
        if case.attack == RAND:
            verdicts = {OWN_LOG: [float(flag) for flag in record["own"]], JUDGED: judged}
        for name, shares in verdicts.items():
            low, high = (100 * end for end in wilson_interval(sum(shares), len(shares)))
            always = 100 * fmean(share == 1 for share in shares) if shares is judged else None
            row = {"attack on the defense": name, "steps x draws": case.budget, "n": len(shares)}
            row |= {"mean": 100 * fmean(shares), "95% interval": f"{low:.1f} to {high:.1f}", f"in all of {DRAWS}": always}
            row |= {f"of the first {shared}": 100 * fmean(shares[:shared]), "passes": f"{passes_of([record]):,.0f}"}
            rows.append(row)
    return rows


def right(record: Record, of: str = "adversarial") -> list[float]:
    """Return for each image the share of draws that are right."""
    shares, flags = ("clean_right", "clean") if of == "clean" else ("right", "flags")
    return record.get(shares) or [float(flag) for flag in record[flags]]


def mean(record: Record, of: str = "adversarial") -> float:
    return 100 * fmean(right(record, of))


@click.command(cls=Benchmark)
@click.option("--model", "name", required=True)
@click.option("--gradients", default=Plan.gradients, show_default=True, help="Steps x draws of an attack.")
@click.option("--sweep-gradients", "sweep", default=Plan.sweep, show_default=True, help="Of those in the table of knobs.")
@click.option("--suite-steps", "suite", default=Plan.suite, show_default=True, help="Of AutoAttack's rand.")
@click.option("--few", default=20, show_default=True, help="Test images of AutoAttack's rand and of the table of knobs.")
@click.option("--tables", default="attacks,ablation,costs,knobs", show_default=True)
@click.option("--table-only", is_flag=True, help="Run nothing, print what is there.")
@image_options("runs/multiresolution")
def main(
    name: str,
    gradients: int,
    sweep: int,
    suite: int,
    few: int,
    tables: str,
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
    plan, folder = Plan(gradients, sweep, suite), out / name
    if gradients < max(COSTS):
        raise click.BadParameter(f"{gradients} is below the {max(COSTS)} draws of one step", param_hint="--gradients")
    if sweep < 2:
        raise click.BadParameter(f"{sweep} is below the 2 draws of one step", param_hint="--sweep-gradients")
    cases = plan.cases()
    chosen = named(tables, cases, "--tables")
    if not table_only:
        x, y = load_dataset(dataset, data_dir=data_dir, n=n)
        about = {"model": name, "dataset": dataset, "weights": model_card(name, model_dir, dataset)["sha256"]}
    for table, case in [] if table_only else [(which, case) for which in chosen for case in cases[which]]:
        model = load_model(name, model_dir, dataset)
        if not any(isinstance(module, Multiresolution) for module in model.modules()):
            raise click.BadParameter(f"{name!r} is no self-ensemble of random resolutions", param_hint="--model")
        count = few if case.attack == RAND or table == "knobs" else n
        record = run(case, model, x[:count], y[:count], folder, eps=eps, seed=seed, about=about)
        click.echo(f"{case.variant}, {case.attack} {case.budget}: {mean(record):.1f} of {record['n']}", err=True)
    found = {which: rows for which in chosen if (rows := rows_of(folder, which, plan))}
    if not found:
        raise click.UsageError(f"{folder} holds nothing yet")
    for which, rows in found.items():
        click.echo(save_table(rows, out / f"{name}_{which}"))


def run(case: Case, model: nn.Module, x: Tensor, y: Tensor, folder: Path, *, eps: float, seed: int, about: Record) -> Record:
    """Return the record of a case, from its file or measured."""
    variant, suite = VARIANTS[case.variant], Rand()
    draws = 1 if variant.frozen else DRAWS
    told = {"variant": case.variant, "attack": case.attack, "steps": case.steps, "looks": case.looks, "draws": draws}
    make = partial((ATTACKS | {RAND: suite.make})[case.attack], steps=case.steps, eot_iter=case.looks, eps=eps, seed=seed)
    return measured(
        case.path(folder),
        variant.of(model, seed),
        x,
        y,
        make,
        eps=eps,
        seed=seed,
        draws=draws,
        score=(lambda images: {"own": suite.own}) if case.attack == RAND else None,
        about=about | told,
    )


if __name__ == "__main__":
    main()
