"""Define the commands ``diagnose``, ``verify``, ``report`` and ``export``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
from click import get_current_context
from click.core import ParameterSource
from rich.markup import escape
from rich.table import Table
from torch import nn
from torchattacks.attack import Attack

from ensemble_attacks import diagnostics
from ensemble_attacks.attacks.registry import find_attack, find_maker
from ensemble_attacks.cli.options import NAMED, console, elsewhere, images, places, radius
from ensemble_attacks.data import numbers_of, open_dataset
from ensemble_attacks.evaluation.audit import verify as verify_run
from ensemble_attacks.evaluation.external import TEXT, export_robustbench, read_bundle
from ensemble_attacks.evaluation.ledger import MANIFEST, Ledger
from ensemble_attacks.evaluation.manifest import Sweep, subjects_of
from ensemble_attacks.evaluation.origins import check_fit as check_images_fit
from ensemble_attacks.evaluation.suite import check_fit
from ensemble_attacks.judge import judge
from ensemble_attacks.models import providers
from ensemble_attacks.models.structure import structure_of
from ensemble_attacks.validation import check_device


@click.command()
@click.option("--model", required=True, help=NAMED)
@click.option("--vote", default="softmax", help="softmax, voting or logits.")
@images(64)
@click.option("--eps", type=float, required=True, help="Linf radius, in pixel units of [0, 1].")
@click.option("--seed", type=int, default=0)
@click.option("--device", default="cpu")
@click.option("--attack", help="The attack whose failures are looked into, by name.  [default: 50 steps of PGD]")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write it there.")
@places
def diagnose(
    model: str,
    vote: str,
    eps: float,
    seed: int,
    device: str,
    attack: str | None,
    path: Path | None,
    model_dir: str | None,
    data_dir: str,
    download: bool,
    **chosen: Any,
) -> None:
    """Is a model masking its gradients? Print checks with figure, threshold and verdict, and the attacks to run."""
    check_device(device)
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"--json {path}: there is no folder {path.parent}, make it first")
    if chosen["sample"] is not None and get_current_context().get_parameter_source("n") is ParameterSource.DEFAULT:
        chosen["n"] = None
    given = {"models": model, "votes": vote, "eps": eps, "seeds": seed, "attacks": "mora", **chosen}
    subjects = subjects_of(Sweep.of(given, "the command"), model_dir=model_dir, data_dir=data_dir, download=download)
    x, y = subjects.opened.take(subjects.numbers)
    net = subjects.models[model].to(device)
    make = None
    if attack is not None:
        maker = find_maker(attack)
        find_attack(attack).check(net, attack)
        structure = structure_of(net, x[:8].to(device), seed)
        check_fit(attack, structure.classes, "Linf", x.shape[1:])
        eot_iter = diagnostics.EOT_ITER if structure.random else None
        make = partial(_of_radius, maker, seed, eot_iter)
    found = diagnostics.diagnose(net, x, y, eps=eps, seed=seed, attack=make)
    table = Table(title=f"{model}, {vote}, {subjects.dataset}, Linf {eps:g}, {len(x)} images")
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


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="A new folder.  [default: report, in the run's]")
@click.option("--device", default="cpu")
@elsewhere
def report(run: Path, out: Path | None, device: str, model: str | None, dataset: str | None) -> None:
    """Write a finished run as one HTML page, Markdown, CSV and figures."""
    from ensemble_attacks.evaluation.report.pages import write_report

    check_device(device)
    page = write_report(run, out or run / "report", device=device, model=model, dataset=dataset)
    console.print(f"Written: {page}", soft_wrap=True)


@click.group()
def export() -> None:
    """Write a finished run in another project's format."""


@export.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option("--partial", is_flag=True, help="Also a run on fewer images than the test set has.")
def robustbench(run: Path, out: Path, partial: bool) -> None:
    """Write RobustBench's external evaluation: adversarial images as .pt, model-info JSON, text."""
    export_robustbench(run, out, partial=partial)
    console.print((out / TEXT).read_text(), markup=False)
    console.print(f"Stored in {out}")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--model", help="As of evaluate.  [default: the run's]")
@click.option("--model-dir", help="Where trained models lie, if not among those that ship.")
@click.option("--vote", help="softmax, voting or logits.  [default: the bundle's, or softmax]")
@click.option("--data", "--dataset", "dataset", help="As of evaluate.  [default: the bundle's, or the run's]")
@click.option("--transform", default="", help="Of a bundle: as of evaluate.")
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
    transform: str,
    data_dir: str | None,
    norm: str | None,
    eps: float | None,
    draws: int | None,
) -> None:
    """Judge stored images anew, from them, the model and the data alone.

    PATH is a run's folder, or an external evaluation, ours or anybody's (a folder, or a .pt file of images).
    """
    if (path / MANIFEST).exists():
        decided = {"vote": vote, "norm": norm, "eps": eps, "draws": draws}
        if given := [key for key, value in decided.items() if value is not None]:
            raise ValueError(f"{path} is a run, which has its own {given[0]}: leave --{given[0]} out")
        findings = verify_run(Ledger(path), data_dir=data_dir, model_dir=model_dir, model=model, dataset=dataset)
        for finding in findings:
            text = "missing or damaged" if finding["differ"] is None else "{robust} of {n} robust, {differ} differ"
            console.print(f"{finding['unit']}: {text.format(**finding)}", highlight=False)
        if any(finding["differ"] != 0 for finding in findings):
            sys.exit(1)
        return
    images_adv, about = read_bundle(path)
    dataset, eps = dataset or about.get("dataset"), about.get("eps") if eps is None else eps
    dataset = dataset or (model and providers.implied_dataset(model, model_dir))
    for option, value in (("--model", model), ("--dataset", dataset), ("--eps", eps)):
        if value is None:
            raise ValueError(f"{path} does not say its {option.strip('-')}: pass {option}")
    opened = open_dataset(str(dataset), data_dir=data_dir or "data", transform=transform)
    x, y = opened.take(numbers_of(opened, range(len(opened)), len(images_adv)))
    net = providers.load_model(str(model), model_dir, str(dataset), vote=vote or about.get("vote") or "softmax")
    check_images_fit(str(model), net, x, y, str(dataset), opened.classes)
    draws = about.get("draws", 1) if draws is None else draws
    norm = norm or about.get("threat_model", "Linf")
    verdict = judge(net, x, y, images_adv, eps=radius(eps), norm=norm, draws=draws)
    console.print(f"{model}: {verdict}", highlight=False)
    if "external" in about:
        console.print(f"The bundle says {about['external']}%.", highlight=False)
