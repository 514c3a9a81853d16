"""Define the commands ``train``, ``convert``, ``models`` and ``doctor``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ensemble_attacks.cli import choices
from ensemble_attacks.cli.choices import DATASETS
from ensemble_attacks.errors import plain

CLEAN = 1000  # test images on which a new model is tried
CLEAN_DRAWS = 5  # forward passes of each, of one that draws its members


@click.command()
@click.argument("recipe")
@click.option("--dataset", default="digits", help=" or ".join(DATASETS) + ".")
@click.option("--data-dir", default="data", help="The folder that holds cifar-10-batches-py, or cifar-100-python.")
@click.option("--download", is_flag=True, help="Let torchvision fetch CIFAR into --data-dir.")
@click.option("--architecture", help="Of every member.  [default: convnet for digits, resnet20 for CIFAR]")
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
    adds adversarial training (in frontend_at it is that of the backbone); adp_igat, dverge_igat or purified.
    """
    from ensemble_attacks.models import providers
    from ensemble_attacks.validation import check_device

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
    from ensemble_attacks.cli.console import WIDE, console
    from ensemble_attacks.models import providers

    card = providers.able_to("convert").convert(checkpoints, name, **options)
    _print_card(card, options["dataset"], options["model_dir"])
    console.print(plain(_clean_accuracy(card, options["dataset"], options["model_dir"], data_dir)), **WIDE)


def _clean_accuracy(card: Path, dataset: str, model_dir: Path, data_dir: str) -> str:
    """Return what is known of the clean accuracy of a new model."""
    from ensemble_attacks.data import DATASETS, load_dataset
    from ensemble_attacks.judge import judge
    from ensemble_attacks.models import providers
    from ensemble_attacks.models.ask import member_probabilities

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
    from ensemble_attacks.cli.console import WIDE, console

    console.print("\n".join(map(plain, card.read_text().splitlines())), **WIDE)
    console.print(plain(f"Load it with --model {card.stem} --dataset {dataset} --model-dir {model_dir}"), **WIDE)
    if card.stem in choices.shipped(dataset):
        console.print(plain(f"A model called {card.stem} ships, too: without --model-dir, it is that one."), **WIDE)


@click.command()
@click.option("--dataset", help=" or ".join(DATASETS) + ".", shell_complete=choices.datasets)
def models(dataset: str | None) -> None:
    """List the models that can be loaded."""
    from ensemble_attacks.data import DATASETS
    from ensemble_attacks.models import providers

    for name in (dataset,) if dataset else DATASETS:
        for model in providers.list_models(name):
            click.echo(f"{name}\t{plain(model)}")


@click.command()
def doctor() -> None:
    """Check the installation; exit with 1 where something is broken."""
    from ensemble_attacks.cli.console import WIDE, console, shown
    from ensemble_attacks.hosts.doctor import ABSENT, BROKEN, NOTE, OK
    from ensemble_attacks.hosts.trials import examine_all

    findings = examine_all()
    colours = {OK: "green", NOTE: "yellow", ABSENT: "dim", BROKEN: "red"}
    for finding in findings:
        mark = f"[{colours[finding.status]}]{finding.status:>6}[/]"
        console.print(f"{mark} {shown(finding.name)}: {shown(finding.found)}", highlight=False, soft_wrap=True)
        if finding.remedy and finding.status != ABSENT:
            console.print(f"       {plain(finding.remedy)}", **WIDE)
    broken = sum(finding.status == BROKEN for finding in findings)
    console.print(f"{broken} broken: see above." if broken else "All that is installed works together.", highlight=False)
    sys.exit(1 if broken else 0)
