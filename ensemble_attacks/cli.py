"""The command line: ``ensemble-attacks evaluate | verify | export | demo | train | convert | models | doctor``."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from ensemble_attacks import __version__, providers
from ensemble_attacks.data import DATASETS, load_dataset
from ensemble_attacks.doctor import BROKEN, NOTE, OK, examine
from ensemble_attacks.ensembles import check_vote
from ensemble_attacks.evaluation.external import TEXT, export_robustbench, read_bundle
from ensemble_attacks.evaluation.passes import passes_per_image
from ensemble_attacks.evaluation.runner import evaluate as run_evaluation
from ensemble_attacks.evaluation.suite import Settings, attack_names, find_attack
from ensemble_attacks.judge import judge
from ensemble_attacks.validation import check_device, check_norm, check_positive

console = Console() if sys.stdout.isatty() else Console(width=120)
DEMO_MODELS = ("gal_convnet_3", "trs_convnet_3")
DEMO_VOTES = ("softmax", "voting")
DEMO_EPS, DEMO_N = 0.12, 50


class Commands(click.Group):
    """Shows an error as one line and exits with 2; ``--debug`` shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, ImportError, FileNotFoundError, FileExistsError, FloatingPointError) as error:
            if ctx.params.get("debug"):
                raise
            raise click.UsageError(str(error), ctx=None) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
def main(debug: bool) -> None:
    """Attacks that tell the truth about ensemble defenses."""
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, format="%(message)s")


@main.command()
@click.option("--model", required=True, help="From `ensemble-attacks models`, robustbench:NAME, timm:NAME, or ensemble:A+B.")
@click.option("--model-dir", help="Where trained models lie, if not among those that ship.")
@click.option("--vote", default="softmax", help="softmax, voting or logits.")
@click.option("--dataset", default="digits", help=" or ".join(DATASETS) + ".")
@click.option("--data-dir", default="data", help="The folder that holds cifar-10-batches-py.")
@click.option("--download", is_flag=True, help="Let torchvision fetch CIFAR-10 into --data-dir.")
@click.option("--norm", default="Linf", help="Linf or L2.")
@click.option("--eps", type=float, required=True, help="Radius of the ball, in pixel units of [0, 1].")
@click.option("--n", type=int, help="Test images, in file order.  [default: all]")
@click.option(
    "--attacks",
    default="autoattack,mora",
    help="Comma-separated: " + ", ".join(attack_names()) + ", or torchattacks:PGD?steps=50.",
)
@click.option("--batch-size", type=int, default=250)
@click.option("--seed", type=int, default=0)
@click.option("--draws", type=int, default=1, help="Forward passes by which the judge decides, of a random model.")
@click.option("--eot-iter", type=int, help="Draws of every iterate, of a random model.")
@click.option("--device", default="cpu")
@click.option("--out", type=click.Path(path_type=Path), help="A new folder for summary, times and images.")
def evaluate(
    model: str,
    model_dir: str | None,
    vote: str,
    dataset: str,
    data_dir: str,
    download: bool,
    norm: str,
    eps: float,
    n: int | None,
    attacks: str,
    batch_size: int,
    seed: int,
    draws: int,
    eot_iter: int | None,
    device: str,
    out: Path | None,
) -> None:
    """Attack a model, judge the images, print the comparison."""
    names = [name.strip() for name in attacks.split(",") if name.strip()]
    if not names:
        raise ValueError("attacks is empty: name at least one, such as --attacks autoattack,mora")
    for name in names:
        find_attack(name)
    check_device(device)
    check_vote(vote)
    check_norm(norm)
    check_positive("eps", eps)
    ensemble = providers.load_model(model, model_dir, dataset, vote=vote).to(device)
    x, y = load_dataset(dataset, data_dir=data_dir, n=n, download=download)
    describe = {"model": model, "vote": vote, "dataset": dataset}

    table = Table(title=f"{model}, {vote}, {dataset}, {norm} {eps:g}, {len(x)} images")
    for column in ("attack", "robust %", "95% interval", "forwards / image", "backwards / image", "seconds"):
        table.add_column(column, justify="left" if column == "attack" else "right")

    def add_row(name: str, row: dict[str, Any]) -> None:
        def spent(row: dict[str, Any]) -> list[str]:
            columns = ("forwards_per_image", "backwards_per_image", "seconds")
            return [f"{row[column]:.1f}" if column in row else "" for column in columns]

        for stage, so_far in row.get("stages", {}).items():
            table.add_row(f"  after {stage}", f"{100 * so_far['robust'] / row['n']:.1f}", "", *spent(so_far), style="dim")
        low, high = row["interval"]
        invalid = f" ({row['invalid']} invalid)" if row.get("invalid") else ""
        table.add_row(name, f"{100 * row['accuracy']:.1f}{invalid}", f"{100 * low:.1f} - {100 * high:.1f}", *spent(row))

    settings = Settings(eps=eps, norm=norm, seed=seed, batch_size=batch_size, draws=draws, eot_iter=eot_iter)
    run_evaluation(ensemble, x, y, names, settings, describe=describe, out=out, report=add_row)
    console.print(table)
    if out is not None:
        console.print(f"Stored in {out}")


@main.command()
@click.option("--n", type=int, default=DEMO_N, help="Test images of each ensemble.")
@click.option("--seed", type=int, default=0)
def demo(n: int, seed: int) -> None:
    """Handwritten digits: what the standard AutoAttack and MORA say of two ensembles, in about a minute."""
    load_dataset("digits", n=n)
    began = time.perf_counter()
    table = Table(title=f"Robust accuracy (%) of three-member ensembles: digits, Linf {DEMO_EPS}, {n} images")
    for column in ("defense", "vote", "clean", "AutoAttack", "MORA", "passes / image: AutoAttack", "MORA"):
        table.add_column(column, justify="left" if column in ("defense", "vote") else "right")
    cells = [(model, vote, n, seed) for model in DEMO_MODELS for vote in DEMO_VOTES]
    workers = min(len(cells), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for row in pool.map(demo_row, *zip(*cells, strict=True)):
            table.add_row(*row)
    console.print(table)
    console.print(f"Judged anew from the images. {time.perf_counter() - began:.0f} seconds.")


def demo_row(model: str, vote: str, n: int, seed: int) -> list[str]:
    """One row of the demo's table."""
    x, y = load_dataset("digits", n=n)
    ensemble = providers.load_model(model, dataset="digits", vote=vote)
    summary = run_evaluation(ensemble, x, y, ["autoattack", "mora"], Settings(eps=DEMO_EPS, seed=seed))
    rows = [summary["attacks"][name] for name in ("autoattack", "mora")]
    spent = [f"{passes_per_image(row):,.0f}" for row in rows]
    accuracies = [f"{100 * row['accuracy']:.1f}" for row in (summary["clean"], *rows)]
    return [model.partition("_")[0], vote, *accuracies, *spent]


@main.command()
@click.argument("recipe")
@click.option("--dataset", default="digits", help=" or ".join(DATASETS) + ".")
@click.option("--data-dir", default="data", help="The folder that holds cifar-10-batches-py.")
@click.option("--download", is_flag=True, help="Let torchvision fetch CIFAR-10 into --data-dir.")
@click.option("--architecture", help="Of every member.  [default: convnet for digits, resnet20 for cifar10]")
@click.option("--members", type=int, default=3)
@click.option("--epochs", type=int, default=30)
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

    standard, at, adp, gal, dverge, trs, one of the last four with _at (adversarial training), multiresolution,
    multiresolution_at, or frontend.
    """
    check_device(options["device"])
    card = providers.able_to("train_model").train_model(recipe, **options)
    _print_card(card, options["dataset"], options["model_dir"] or options["out"])


@main.command()
@click.argument("checkpoints", nargs=-1, required=True, metavar="FILE...")
@click.option("--name", required=True, help="Of the new model, as in dverge_resnet20_3.")
@click.option("--model-dir", type=click.Path(path_type=Path), required=True, help="Where the model goes.")
@click.option("--dataset", default="cifar10", help=" or ".join(DATASETS) + ".")
@click.option("--normalization", default="cifar10", help="cifar10, imagenet or none, where the checkpoint has none.")
@click.option("--negative-slope", type=float, default=0.0, help="Of the members' leaky ReLU: 0.1 for published GAL.")
def convert(checkpoints: tuple[str, ...], name: str, **options: Any) -> None:
    """Make a model of published checkpoints: DVERGE's layout (also for ADP and GAL), akamaster's, plain state dicts."""
    card = providers.able_to("convert").convert(checkpoints, name, **options)
    _print_card(card, options["dataset"], options["model_dir"])


def _print_card(card: Path, dataset: str, model_dir: Path) -> None:
    console.print(card.read_text(), highlight=False)
    console.print(f"Load it with --model {card.stem} --dataset {dataset} --model-dir {model_dir}", soft_wrap=True)


@main.group()
def export() -> None:
    """Write a finished run in another project's format."""


@export.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option("--partial", is_flag=True, help="Also a run on fewer images than the test set has.")
def robustbench(run: Path, out: Path, partial: bool) -> None:
    """RobustBench's external evaluation: adversarial images as .pt, model-info JSON, text."""
    export_robustbench(run, out, partial=partial)
    console.print((out / TEXT).read_text(), markup=False)
    console.print(f"Stored in {out}")


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="As of evaluate.")
@click.option("--model-dir", help="Where trained models lie, if not among those that ship.")
@click.option("--vote", help="softmax, voting or logits.  [default: the bundle's, or softmax]")
@click.option("--dataset", help=" or ".join(DATASETS) + ".  [default: the bundle's]")
@click.option("--data-dir", default="data", help="The folder that holds cifar-10-batches-py.")
@click.option("--norm", help="Linf or L2.  [default: the bundle's, or Linf]")
@click.option("--eps", type=float, help="In pixel units of [0, 1].  [default: the bundle's]")
@click.option("--draws", type=int, default=1, help="Forward passes of each image, of a random model.")
def verify(
    bundle: Path,
    model: str,
    model_dir: str | None,
    vote: str | None,
    dataset: str | None,
    data_dir: str,
    norm: str | None,
    eps: float | None,
    draws: int,
) -> None:
    """Judge an external evaluation anew, ours or anybody's (a .pt file of images), from the images alone."""
    images, about = read_bundle(bundle)
    dataset, eps = dataset or about.get("dataset"), eps or about.get("eps")
    if dataset is None or eps is None:
        missing = "--dataset" if dataset is None else "--eps"
        raise ValueError(f"{bundle} does not say its {missing.strip('-')}: pass {missing}")
    x, y = load_dataset(dataset, data_dir=data_dir, n=len(images))
    judged = providers.load_model(model, model_dir, dataset, vote=vote or about.get("vote") or "softmax")
    verdict = judge(judged, x, y, images, eps=float(eps), norm=norm or about.get("threat_model", "Linf"), draws=draws)
    console.print(f"{model}: {verdict}", highlight=False)
    if "external" in about:
        console.print(f"The bundle says {about['external']}%.", highlight=False)


@main.command()
@click.option("--dataset", help=" or ".join(DATASETS) + ".")
def models(dataset: str | None) -> None:
    """List the models that can be loaded."""
    for name in (dataset,) if dataset else DATASETS:
        for model in providers.list_models(name):
            click.echo(f"{name}\t{model}")


@main.command()
def doctor() -> None:
    """Check the installation; exits with 1 where something is broken."""
    findings = examine()
    colours = {OK: "green", NOTE: "yellow", BROKEN: "red"}
    for finding in findings:
        console.print(f"[{colours[finding.status]}]{finding.status:>6}[/] {finding.name}: {finding.found}", highlight=False)
        if finding.remedy:
            console.print(f"       {finding.remedy}", highlight=False, markup=False)
    sys.exit(1 if any(finding.status == BROKEN for finding in findings) else 0)
