"""Define the commands ``train``, ``convert``, ``attacks``, ``models`` and ``doctor``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.table import Column, Table

from ensemble_attacks.attacks.peers import PEER
from ensemble_attacks.attacks.registry import registered
from ensemble_attacks.cli.options import WIDE, console, shown
from ensemble_attacks.data import DATASETS, load_dataset
from ensemble_attacks.errors import plain
from ensemble_attacks.hosts.doctor import BROKEN, NOTE, OK, examine
from ensemble_attacks.judge import judge
from ensemble_attacks.models import providers
from ensemble_attacks.models.ensembles import member_probabilities
from ensemble_attacks.validation import check_device

CLEAN = 1000  # test images on which a new model is tried
CLEAN_DRAWS = 5  # forward passes of each, of one that draws its members


@click.command()
@click.argument("recipe")
@click.option("--dataset", default="digits", help=" or ".join(DATASETS) + ".")
@click.option("--data-dir", default="data", help="The folder that holds cifar-10-batches-py.")
@click.option("--download", is_flag=True, help="Let torchvision fetch CIFAR-10 into --data-dir.")
@click.option("--architecture", help="Of every member.  [default: convnet for digits, resnet20 for cifar10]")
@click.option("--members", type=int, default=3)
@click.option("--epochs", type=int, default=30)
@click.option("--minutes", type=float, help="Train that long instead; the schedule follows the clock.")
@click.option("--batch-size", type=int, default=128)
@click.option("--seed", type=int, default=0)
@click.option("--device", default="cpu")
@click.option("--start-from", help="A model to start from.  [default: the recipe's; DVERGE's is the standard ensemble]")
@click.option("--max-lr", type=float, help="Peak of the one-cycle schedule.  [default: the recipe's]")
@click.option("--amp", is_flag=True, help="Networks in bfloat16 autocast: about twice as fast where the hardware has it.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="For checkpoint and log; resumes from there.")
@click.option("--model-dir", type=click.Path(path_type=Path), help="Where the finished model goes.  [default: --out]")
def train(recipe: str, **options: Any) -> None:
    """Train a defense, with one command, resumable.

    RECIPE is standard, at, each_at, adp, gal, dverge, trs, multiresolution, frontend, or one of the last six with _at, which
    adds adversarial training; in frontend_at it is that of the backbone.
    """
    check_device(options["device"])
    card = providers.able_to("train_model").train_model(recipe, **options)
    _print_card(card, options["dataset"], options["model_dir"] or options["out"])


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, metavar="FILE...")
@click.option("--name", required=True, help="Of the new model, as in dverge_resnet20_3.")
@click.option("--model-dir", type=click.Path(path_type=Path), required=True, help="Where the model goes.")
@click.option("--dataset", default="cifar10", help=" or ".join(DATASETS) + ".")
@click.option("--normalization", default="cifar10", help="cifar10, imagenet or none, where the checkpoint has none.")
@click.option("--negative-slope", type=float, help="Of the members' leaky ReLU.  [default: the checkpoint's, else 0, ReLU]")
@click.option("--data-dir", default="data", help="The folder that holds cifar-10-batches-py, for the clean accuracy.")
def convert(checkpoints: tuple[str, ...], name: str, data_dir: str, **options: Any) -> None:
    """Make a model of published checkpoints: DVERGE's layout (also for ADP and GAL), akamaster's, plain state dicts.

    Its clean accuracy is printed, where the data are at hand.
    """
    card = providers.able_to("convert").convert(checkpoints, name, **options)
    _print_card(card, options["dataset"], options["model_dir"])
    console.print(plain(_clean_accuracy(card, options["dataset"], options["model_dir"], data_dir)), **WIDE)


def _clean_accuracy(card: Path, dataset: str, model_dir: Path, data_dir: str) -> str:
    """Return what is known of the clean accuracy of a new model."""
    try:
        x, y = load_dataset(dataset, data_dir=data_dir, n=min(CLEAN, DATASETS[dataset].test_images))
    except FileNotFoundError as error:
        return f"Clean accuracy unknown, as there are no data: {error}"
    model = providers.load_model(card.stem, str(model_dir), dataset)
    verdict = judge(model, x, y, x, eps=1.0, draws=1 if member_probabilities(model) is None else CLEAN_DRAWS)
    low, high = verdict.interval
    return (
        f"Clean accuracy: {100 * verdict.accuracy:.1f}% [{100 * low:.1f}, {100 * high:.1f}] of {len(y)} test images. "
        "Far below the published one, the members had another --normalization or --negative-slope."
    )


def _print_card(card: Path, dataset: str, model_dir: Path) -> None:
    console.print("\n".join(map(plain, card.read_text().splitlines())), **WIDE)
    console.print(plain(f"Load it with --model {card.stem} --dataset {dataset} --model-dir {model_dir}"), **WIDE)


@click.command()
@click.option("--dataset", help=" or ".join(DATASETS) + ".")
def models(dataset: str | None) -> None:
    """List the models that can be loaded."""
    for name in (dataset,) if dataset else DATASETS:
        for model in providers.list_models(name):
            click.echo(f"{name}\t{plain(model)}")


@click.command()
def attacks() -> None:
    """List the attacks: what each does, needs and costs.

    The cost is the number of forward and backward passes of an image that holds out; of a random model, times its draws.
    """
    table = Table(Column("name", no_wrap=True), "what it does", "norms", "needs", Column("passes", justify="right"))
    for name, record in registered().items():
        needs = [*record.needs, *([f"{record.fewest_classes} classes"] if record.fewest_classes > 2 else [])]
        cost = "" if record.cost is None else f"{record.cost:,}"
        meaning = record.summary + (f" ({record.source})" if record.source else "")
        table.add_row(shown(name), shown(meaning), ", ".join(record.norms), ", ".join(needs), cost)
    table.add_row(f"{PEER}NAME", "any of torchattacks', with options: torchattacks:PGD?steps=50&alpha=0.002")
    console.print(table)


@click.command()
def doctor() -> None:
    """Check the installation; exit with 1 where something is broken."""
    findings = examine()
    colours = {OK: "green", NOTE: "yellow", BROKEN: "red"}
    for finding in findings:
        console.print(
            f"[{colours[finding.status]}]{finding.status:>6}[/] {shown(f'{finding.name}: {finding.found}')}", highlight=False
        )
        if finding.remedy:
            console.print(f"       {plain(finding.remedy)}", **WIDE)
    sys.exit(1 if any(finding.status == BROKEN for finding in findings) else 0)
