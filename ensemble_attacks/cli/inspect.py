"""Define the commands ``diagnose``, ``report`` and ``export``."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click import get_current_context
from click.core import ParameterSource

from ensemble_attacks.cli import choices
from ensemble_attacks.cli.options import EPS, NAMED, check_out, elsewhere, images, places, within

if TYPE_CHECKING:
    from torch import nn
    from torchattacks.attack import Attack


@click.command()
@click.option("--model", required=True, help=NAMED, shell_complete=choices.models)
@click.option("--vote", default="softmax", help="softmax, voting or logits.", shell_complete=choices.votes)
@images(64)
@click.option("--eps", required=True, help=EPS)
@within
@click.option("--seed", type=int, default=0)
@click.option("--device", default="cpu")
@click.option(
    "--attack",
    help="The attack whose failures are looked into, by name.  [default: 50 steps of PGD]",
    shell_complete=choices.attacks,
)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write it there.")
@places
def diagnose(
    model: str,
    vote: str,
    eps: str,
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
    from rich.table import Table
    from tqdm import tqdm

    from ensemble_attacks import diagnostics
    from ensemble_attacks.attacks.registry import find_attack, find_maker
    from ensemble_attacks.cli.console import WIDE, console, shown
    from ensemble_attacks.errors import plain
    from ensemble_attacks.evaluation.manifest import subjects_of, vote_said
    from ensemble_attacks.evaluation.settings import Sweep
    from ensemble_attacks.evaluation.suite import check_fit
    from ensemble_attacks.evaluation.units import radius_said
    from ensemble_attacks.files import write_whole
    from ensemble_attacks.models.ask import beside, moved
    from ensemble_attacks.models.structure import structure_of
    from ensemble_attacks.validation import check_device

    check_device(device)
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        what = "is a folder, name a file in it" if path.is_dir() else f"there is no folder {path.parent}, make it first"
        raise FileNotFoundError(f"--json {path}: {what}")
    most = None
    if get_current_context().get_parameter_source("n") is ParameterSource.DEFAULT:  # so many, if there are, unless chosen
        most, chosen["n"] = None if chosen["sample"] is not None else chosen["n"], None
    given = {"models": model, "votes": vote, "eps": eps, "seeds": seed, "attacks": "mora", **chosen}
    sweep = Sweep.of(given, "the command")
    settings = sweep.settings(sweep.eps[0], seed, sweep.threat)
    if settings.mask is not None:
        raise ValueError("movable: the checks know no mask; diagnose without it, or attack with MORA or APGD")
    subjects = subjects_of(sweep, model_dir=model_dir, data_dir=data_dir, download=download)
    x, y = subjects.opened.take(subjects.numbers[:most])
    net = moved(subjects.models[model], device)
    make = None
    if attack is not None:
        maker = find_maker(attack)
        find_attack(attack).check(net, attack)
        structure = structure_of(net, beside(net, x[:8]), seed)
        check_fit(attack, structure.classes, "Linf", x.shape[1:])
        eot_iter = diagnostics.EOT_ITER if structure.random else None
        make = partial(_of_radius, maker, seed, eot_iter)
    with tqdm(desc=f"checks on {len(x)} images", unit=" passes", unit_scale=True, disable=None, leave=False) as bar:
        looked: dict[str, Any] = {"attack": make, "box": settings.box, "on_pass": bar.update}
        found = diagnostics.diagnose(net, x, y, eps=settings.eps, seed=seed, **looked)
    ball = radius_said({"norm": "Linf", "eps": sweep.eps[0], "within": sweep.threat.said(sweep.eps[0])})
    table = Table(title=f"{shown(model)}, {shown(vote_said(net))}, {shown(subjects.dataset)}, {ball}, {len(x)} images")
    for column in ("check", "verdict", "figure", "threshold", "what it is", "run next", "source"):
        table.add_column(column, justify="right" if column in ("figure", "threshold") else "left", overflow="fold")
    colours = {"flag": "red", "ok": "green", "note": "dim"}
    for check in found.checks:
        threshold = "" if check.threshold is None else f"{check.threshold:.2f}"
        following = check.next if check.verdict == "flag" else ""
        verdict = f"[{colours[check.verdict]}]{check.verdict}[/]"
        table.add_row(
            check.name,
            verdict,
            f"{check.figure:.2f}",
            threshold,
            shown(check.meaning),
            shown(following),
            shown(check.source),
        )
    console.print(table)
    console.print(f"Run: --attacks {','.join(map(plain, found.attacks))}", **WIDE)
    console.print(f"{found.passes:,.0f} passes per image.", highlight=False)
    if path is not None:
        write_whole(path, json.dumps(found.as_dict(), indent=2).encode() + b"\n")


def _of_radius(make: Callable[..., Attack], seed: int, eot_iter: int | None, model: nn.Module, eps: float) -> Attack:
    return make(model, norm="Linf", eps=eps, seed=seed, batch_size=250, eot_iter=eot_iter)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="A new folder.  [default: report, in the run's]")
@click.option("--device", default="cpu")
@elsewhere
def report(run: Path, out: Path | None, device: str, model: str | None, dataset: str | None) -> None:
    """Write a finished run as one HTML page, Markdown, CSV and figures."""
    from ensemble_attacks.cli.console import WIDE, console
    from ensemble_attacks.errors import plain
    from ensemble_attacks.extras import extra
    from ensemble_attacks.validation import check_device

    with extra("report", "a report"):
        from ensemble_attacks.evaluation.report.pages import write_report

    check_device(device)
    check_out(out)
    with console.status("Reading the run ...") as status:

        def tell(what: str) -> None:
            status.update(f"Writing the report: {plain(what)} ...")

        page = write_report(run, out or run / "report", device=device, model=model, dataset=dataset, tell=tell)
    console.print(f"Written: {plain(page)}", **WIDE)


@click.group()
def export() -> None:
    """Write a finished run in another project's format."""


@export.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option("--partial", is_flag=True, help="Also a run on fewer images than the test set has.")
def robustbench(run: Path, out: Path, partial: bool) -> None:
    """Write RobustBench's external evaluation: adversarial images as .pt, model-info JSON, text."""
    from ensemble_attacks.cli.console import WIDE, console
    from ensemble_attacks.errors import plain
    from ensemble_attacks.evaluation.external import TEXT, export_robustbench

    check_out(out)
    export_robustbench(run, out, partial=partial)
    console.print("\n".join(map(plain, (out / TEXT).read_text().splitlines())), **WIDE)
    console.print(f"Stored in {plain(out)}", **WIDE)


@export.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--repo", required=True, help="user/name, which is made where it is not there.")
@click.option("--weights", type=click.Path(path_type=Path), help="The model's file or folder: it is shared, not the run.")
@click.option("--private", is_flag=True, help="Make a new repository a private one.")
def hub(run: Path, repo: str, weights: Path | None, private: bool) -> None:
    """Share a run on the Hugging Face hub, or with --weights its model, with a card that holds the figures."""
    from ensemble_attacks.cli.console import WIDE, console
    from ensemble_attacks.errors import plain
    from ensemble_attacks.evaluation.hub import push_to_hub

    console.print(f"Shared: {plain(push_to_hub(run, repo, weights=weights, private=private))}", **WIDE)
