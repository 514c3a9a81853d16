"""The command line: ``ensemble-attacks evaluate | diagnose | sweep | status | resume | verify | report | export | demo |
train | convert | models | doctor``.
"""

from __future__ import annotations

import ast
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial, reduce
from inspect import signature
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from torchattacks.attack import Attack
from tqdm import tqdm

from ensemble_attacks import __version__, diagnostics, providers
from ensemble_attacks.data import DATASETS, load_dataset
from ensemble_attacks.doctor import BROKEN, NOTE, OK, examine
from ensemble_attacks.errors import LedgerError, unknown_name
from ensemble_attacks.evaluation.engines import ENGINES, run
from ensemble_attacks.evaluation.external import TEXT, export_robustbench, read_bundle
from ensemble_attacks.evaluation.ledger import MANIFEST, Ledger
from ensemble_attacks.evaluation.runner import evaluate as run_evaluation
from ensemble_attacks.evaluation.suite import SUITES, Settings
from ensemble_attacks.evaluation.sweep import (
    CLEAN,
    Sweep,
    chains_of,
    manifest_of,
    progress,
    run_identity,
    seconds_of,
    seed_said,
)
from ensemble_attacks.evaluation.sweep import verify as verify_run
from ensemble_attacks.judge import judge
from ensemble_attacks.original import STANDARD
from ensemble_attacks.passes import passes_per_image
from ensemble_attacks.registry import HOSTS, OURS, find_attack
from ensemble_attacks.structure import structure_of
from ensemble_attacks.validation import check_choice, check_count, check_device

console = Console() if sys.stdout.isatty() else Console(width=120)
ATTACKS = (*SUITES, *STANDARD, *OURS)  # in the help, and whatever other packages register
DEMO_MODELS = ("gal_convnet_3", "trs_convnet_3")
DEMO_VOTES = ("softmax", "voting")
DEMO_EPS, DEMO_N = 0.12, 50


class Commands(click.Group):
    """Shows an error as one line and exits with 2, or with 130 after SIGINT; ``--debug`` shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, ImportError, LedgerError, OSError, FloatingPointError) as error:
            if ctx.params.get("debug"):
                raise
            raise click.UsageError(str(error), ctx=None) from error
        except KeyboardInterrupt:
            raise SystemExit(130) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
def main(debug: bool) -> None:
    """Attacks that tell the truth about ensemble defenses."""
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, format="%(message)s")


def places(command: Callable[..., None]) -> Callable[..., None]:
    """Where things lie."""
    options = [
        click.option("--model-dir", help="Where trained models lie, if not among those that ship."),
        click.option("--data-dir", default="data", help="The folder that holds cifar-10-batches-py."),
        click.option("--download", is_flag=True, help="Let torchvision fetch CIFAR-10 into --data-dir."),
    ]
    return reduce(lambda decorated, option: option(decorated), reversed(options), command)


def machines(command: Callable[..., None]) -> Callable[..., None]:
    """Who does the work."""
    options = [
        click.option("--engine", default="local", help=", ".join(ENGINES) + "."),
        click.option("--workers", type=int, default=1, help="Processes of the engine local."),
        click.option("--device", default="cpu", help="Comma-separated: the workers take turns."),
        click.option("-O", "--option", "options", multiple=True, metavar="KEY=VALUE", help="Of the engines ray and slurm."),
    ]
    return reduce(lambda decorated, option: option(decorated), reversed(options), command)


@main.command()
@click.option("--model", required=True, help="From `ensemble-attacks models`, robustbench:NAME, timm:NAME, or ensemble:A+B.")
@click.option("--vote", default="softmax", help="softmax, voting or logits.")
@click.option("--dataset", default="digits", help=" or ".join(DATASETS) + ".")
@click.option("--norm", default="Linf", help="Linf or L2.")
@click.option("--eps", type=float, required=True, help="Radius of the ball, in pixel units of [0, 1].")
@click.option("--n", type=int, help="Test images, in file order.  [default: all]")
@click.option(
    "--attacks",
    default="autoattack,mora",
    help="Comma-separated: " + ", ".join(ATTACKS) + ", or torchattacks:PGD?steps=50.",
)
@click.option("--cascade", is_flag=True, help="An image that an attack has fooled is not attacked by the next.")
@click.option("--batch-size", type=int, default=250)
@click.option("--shard-size", type=int, default=250, help="Images of every task.")
@click.option("--seed", type=int, default=0)
@click.option("--draws", type=int, default=1, help="Forward passes by which the judge decides, of a random model.")
@click.option("--eot-iter", type=int, help="Draws of every iterate, of a random model.")
@click.option("--amp", is_flag=True, help="Craft in mixed precision, which is faster; the judge does not.")
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder.  [default: one of its own in runs/]")
@places
@machines
def evaluate(
    model: str,
    vote: str,
    eps: float,
    attacks: str,
    seed: int,
    out: Path | None,
    model_dir: str | None,
    data_dir: str,
    download: bool,
    engine: str,
    workers: int,
    device: str,
    options: tuple[str, ...],
    **settings: Any,
) -> None:
    """Attack a model, judge the images, print the comparison. The same command again goes on where it was stopped."""
    names = [name.strip() for name in attacks.split(",") if name.strip()]
    if not names:
        raise ValueError("attacks is empty: name at least one, such as --attacks autoattack,mora")
    _check_machine(engine, workers, device, options)
    given = {"models": model, "votes": vote, "eps": eps, "seeds": seed, "attacks": names, **settings}
    manifest = manifest_of(Sweep.of(given, "the command"), model_dir=model_dir, data_dir=data_dir, download=download)
    _run(manifest, out, engine=engine, workers=workers, device=device, options=options)


@main.command()
@click.option("--model", required=True, help="As of evaluate.")
@click.option("--vote", default="softmax", help="softmax, voting or logits.")
@click.option("--dataset", default="digits", help=" or ".join(DATASETS) + ".")
@click.option("--eps", type=float, required=True, help="Linf radius, in pixel units of [0, 1].")
@click.option("--n", type=int, default=64, help="Test images, in file order.")
@click.option("--seed", type=int, default=0)
@click.option("--device", default="cpu")
@click.option("--attack", help="The attack whose failures are looked into, by name.  [default: 50 steps of PGD]")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write it there.")
@places
def diagnose(
    model: str,
    vote: str,
    dataset: str,
    eps: float,
    n: int,
    seed: int,
    device: str,
    attack: str | None,
    path: Path | None,
    model_dir: str | None,
    data_dir: str,
    download: bool,
) -> None:
    """Is a model masking its gradients? Checks with figure, threshold and verdict, and the attacks to run."""
    check_device(device)
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"--json {path}: there is no folder {path.parent}, make it first")
    x, y = load_dataset(dataset, data_dir=data_dir, n=n, download=download)
    net = providers.load_model(model, model_dir, dataset, vote=vote).to(device)
    make = None
    if attack is not None:
        if attack in HOSTS or attack in SUITES:
            raise ValueError(f"attack {attack!r} is AutoAttack's own: choose from {', '.join(OURS)}, or torchattacks:NAME")
        named = find_attack(attack)
        named.check(net)
        eot_iter = diagnostics.EOT_ITER if structure_of(net, x[:8].to(device), seed).random else None
        make = partial(_of_radius, named.make, seed, eot_iter)
    found = diagnostics.diagnose(net, x, y, eps=eps, seed=seed, attack=make)
    table = Table(title=f"{model}, {vote}, {dataset}, Linf {eps:g}, {n} images")
    for column in ("check", "verdict", "figure", "threshold", "what it is", "run next", "source"):
        table.add_column(column, justify="right" if column in ("figure", "threshold") else "left")
    colours = {"flag": "red", "ok": "green", "note": "dim"}
    for check in found.checks:
        threshold = "" if check.threshold is None else f"{check.threshold:.2f}"
        shown = check.next if check.verdict == "flag" else ""
        verdict = f"[{colours[check.verdict]}]{check.verdict}[/]"
        table.add_row(
            check.name, verdict, f"{check.figure:.2f}", threshold, escape(check.meaning), shown, escape(check.source)
        )
    console.print(table)
    console.print(f"Run: --attacks {','.join(found.attacks)}", highlight=False, soft_wrap=True)
    console.print(f"{found.passes:,.0f} passes per image.", highlight=False)
    if path is not None:
        path.write_text(json.dumps(found.as_dict(), indent=2) + "\n")


def _of_radius(make: Callable[..., Attack], seed: int, eot_iter: int | None, model: nn.Module, eps: float) -> Attack:
    return make(model, norm="Linf", eps=eps, seed=seed, batch_size=250, eot_iter=eot_iter)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder.  [default: one of its own in runs/]")
@places
@machines
def sweep(
    config: Path,
    out: Path | None,
    model_dir: str | None,
    data_dir: str,
    download: bool,
    **machine: Any,
) -> None:
    """Evaluate what a TOML file describes: models x votes x eps x seeds, as `evaluate` does one."""
    _check_machine(**machine)
    manifest = manifest_of(Sweep.read(config), model_dir=model_dir, data_dir=data_dir, download=download)
    _run(manifest, out, **machine)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@machines
def resume(run: Path, **machine: Any) -> None:
    """Go on with a run; units that were given up are tried again."""
    _check_machine(**machine)
    ledger = Ledger(run)
    ledger.retry_failed()
    _drive(ledger, **machine)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
def status(run: Path) -> None:
    """How far a run is, and what failed."""
    ledger = Ledger(run)
    found = progress(ledger)
    console.print(f"{found['done']} of {found['all']} units done", highlight=False)
    if found["hours_left"]:
        console.print(f"{found['per_hour']:,.0f} an hour, {found['hours_left']:.1f} hours left", highlight=False)
    for name in found["running"]:
        console.print(f"running: {name}", highlight=False, markup=False)
    for name in found["killed"]:
        console.print(
            f"killed: {name}; `ensemble-attacks resume {run}` goes on", highlight=False, markup=False, soft_wrap=True
        )
    for failure in found["failed"]:
        text = f"failed {failure['failures']} times: {failure['unit']}: {failure['error']}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    for name in found["quarantined"]:
        console.print(f"damaged, in quarantine: {name}", highlight=False, markup=False)


def _run(manifest: dict[str, Any], out: Path | None, **machine: Any) -> None:
    _drive(Ledger(out or Path("runs") / run_identity(manifest), manifest), **machine)


def _drive(ledger: Ledger, engine: str, workers: int, device: str, options: tuple[str, ...]) -> None:
    given: dict[str, Any] = dict(_option(text) for text in options) | {"devices": device.split(",")}
    given |= {"workers": workers} if engine == "local" else {}
    total = len(chains_of(ledger.manifest))
    with tqdm(total=total, unit="task", disable=None if total > 1 else True, leave=False) as bar:
        try:
            summary = run(ledger, engine=engine, report=lambda chain: bar.update(), **given)
        except KeyboardInterrupt:
            console.print(f"\nStopped: the same command, or `ensemble-attacks resume {ledger.folder}`, goes on.")
            sys.exit(130)
    spent = seconds_of(ledger)
    for cell in summary["cells"]:
        console.print(_table(cell, spent))
    console.print(f"Stored in {ledger.folder}", soft_wrap=True)
    if quarantined := ledger.quarantined():
        console.print(
            f"{len(quarantined)} damaged files are in {ledger.folder}/quarantine; what they held was computed anew."
        )
    missing = [name for cell in summary["cells"] for name in cell.get("missing", [])]
    for name in missing:
        console.print(f"Given up: {name} (ensemble-attacks status {ledger.folder})", markup=False, soft_wrap=True)
    if missing:
        sys.exit(1)


def _check_machine(engine: str, workers: int, device: str, options: tuple[str, ...]) -> None:
    """Raise on an engine or options that cannot be; the devices of other machines are not looked at."""
    check_choice("engine", engine, tuple(ENGINES))
    check_count("workers", workers)
    known = [name for name, of in signature(ENGINES[engine]).parameters.items() if of.kind is of.KEYWORD_ONLY]
    known = [name for name in known if name not in ("workers", "devices")]
    for key, _ in map(_option, options):
        if key not in known:
            raise unknown_name(f"option of the engine {engine!r} (-O)", key, known)
    if engine == "local":
        for name in device.split(","):
            check_device(name)


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"option {text!r}: write KEY=VALUE, as in -O minutes=60")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _table(cell: dict[str, Any], spent: dict[str, float]) -> Table:
    title = f"{cell['model']}, {cell['vote']}, {cell['dataset']}, {cell['norm']} {cell['eps']:g}, {cell['n']} images"
    table = Table(title=title + seed_said(cell))
    for column in ("attack", "robust %", "95% interval", "forwards / image", "backwards / image", "seconds"):
        table.add_column(column, justify="left" if column == "attack" else "right")

    def passes(row: dict[str, Any]) -> list[str]:
        return [f"{row[kind]:.1f}" if kind in row else "" for kind in ("forwards_per_image", "backwards_per_image")]

    def add(name: str, row: dict[str, Any]) -> None:
        for stage, so_far in row.get("stages", {}).items():
            table.add_row(f"  after {stage}", f"{100 * so_far['robust'] / row['n']:.1f}", "", *passes(so_far), style="dim")
        low, high = row["interval"]
        invalid = "".join(f" ({row[kind]} {kind})" for kind in ("invalid", "outside") if row.get(kind))
        key = " ".join(str(cell[part]) for part in ("model", "vote", "eps", "seed")) + f" {name}"
        seconds = f"{spent[key]:.1f}" if key in spent and name != CLEAN else ""
        table.add_row(
            name, f"{100 * row['accuracy']:.1f}{invalid}", f"{100 * low:.1f} - {100 * high:.1f}", *passes(row), seconds
        )

    if cell["clean"] is not None:
        add(CLEAN, {key: value for key, value in cell["clean"].items() if "per_image" not in key})
    for name, row in cell["attacks"].items():
        add(name, row)
    if "worst_case" in cell:
        add("worst case", cell["worst_case"])
    return table


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

    standard, at, adp, gal, dverge, trs, multiresolution, frontend, or one of the last six with _at: adversarial training, of
    the backbone in frontend_at.
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
@click.option("--negative-slope", type=float, help="Of the members' leaky ReLU.  [default: 0.1 for gal..., else 0]")
def convert(checkpoints: tuple[str, ...], name: str, **options: Any) -> None:
    """Make a model of published checkpoints: DVERGE's layout (also for ADP and GAL), akamaster's, plain state dicts."""
    card = providers.able_to("convert").convert(checkpoints, name, **options)
    _print_card(card, options["dataset"], options["model_dir"])


def _print_card(card: Path, dataset: str, model_dir: Path) -> None:
    console.print(card.read_text(), highlight=False)
    console.print(f"Load it with --model {card.stem} --dataset {dataset} --model-dir {model_dir}", soft_wrap=True)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="A new folder.  [default: report, in the run's]")
@click.option("--device", default="cpu")
def report(run: Path, out: Path | None, device: str) -> None:
    """Write a finished run as one HTML page, Markdown, CSV and figures."""
    from ensemble_attacks.evaluation.report import write_report

    check_device(device)
    console.print(f"Written: {write_report(run, out or run / 'report', device=device)}", soft_wrap=True)


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
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--model", help="Of a bundle: as of evaluate.")
@click.option("--model-dir", help="Where trained models lie, if not among those that ship.")
@click.option("--vote", help="softmax, voting or logits.  [default: the bundle's, or softmax]")
@click.option("--dataset", help=" or ".join(DATASETS) + ".  [default: the bundle's]")
@click.option("--data-dir", help="The folder that holds cifar-10-batches-py.  [default: the run's, or data]")
@click.option("--norm", help="Linf or L2.  [default: the bundle's, or Linf]")
@click.option("--eps", type=float, help="In pixel units of [0, 1].  [default: the bundle's]")
@click.option("--draws", type=int, help="Forward passes of each image, of a random model.  [default: the bundle's, or 1]")
def verify(
    path: Path,
    model: str | None,
    model_dir: str | None,
    vote: str | None,
    dataset: str | None,
    data_dir: str | None,
    norm: str | None,
    eps: float | None,
    draws: int | None,
) -> None:
    """Judge stored images anew, from them, the model and the data alone: a run's folder, or an external evaluation, ours or
    anybody's (a folder, or a .pt file of images).
    """
    if (path / MANIFEST).exists():
        decided = {"model": model, "vote": vote, "dataset": dataset, "norm": norm, "eps": eps, "draws": draws}
        if given := [key for key, value in decided.items() if value is not None]:
            raise ValueError(f"{path} is a run, which has its own {given[0]}: leave --{given[0]} out")
        findings = verify_run(Ledger(path), data_dir=data_dir, model_dir=model_dir)
        for finding in findings:
            text = "missing or damaged" if finding["differ"] is None else "{robust} of {n} robust, {differ} differ"
            console.print(f"{finding['unit']}: {text.format(**finding)}", highlight=False)
        if any(finding["differ"] != 0 for finding in findings):
            sys.exit(1)
        return
    images, about = read_bundle(path)
    dataset, eps = dataset or about.get("dataset"), about.get("eps") if eps is None else eps
    for option, value in (("--model", model), ("--dataset", dataset), ("--eps", eps)):
        if value is None:
            raise ValueError(f"{path} does not say its {option.strip('-')}: pass {option}")
    x, y = load_dataset(str(dataset), data_dir=data_dir or "data", n=len(images))
    net = providers.load_model(str(model), model_dir, str(dataset), vote=vote or about.get("vote") or "softmax")
    draws = about.get("draws", 1) if draws is None else draws
    norm = norm or about.get("threat_model", "Linf")
    verdict = judge(net, x, y, images, eps=_radius(eps), norm=norm, draws=draws)
    console.print(f"{model}: {verdict}", highlight=False)
    if "external" in about:
        console.print(f"The bundle says {about['external']}%.", highlight=False)


def _radius(text: object) -> float:
    """A number, or a fraction such as RobustBench's ``8/255``."""
    try:
        return float(Fraction(str(text).replace(" ", "")))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"eps {text!r} is no number: write it as 0.03 or 8/255") from error


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
