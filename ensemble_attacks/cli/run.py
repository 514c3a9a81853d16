"""Define the commands ``evaluate``, ``sweep``, ``resume`` and ``status``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ensemble_attacks.attacks.registry import MINIMAL, RECORDS
from ensemble_attacks.cli import choices
from ensemble_attacks.cli.options import (
    EPS,
    NAMED,
    check_log,
    check_machine,
    check_out,
    elsewhere,
    images,
    machines,
    places,
    planned,
    tracked,
    within,
)

CURVE_ATTACKS = "mora"  # whose radius is searched, where the user does not say


class ListsAttacks(click.Command):
    """A command whose help ends with a line for each attack."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Attacks"):
            formatter.write_dl([(name, record.summary) for name, record in RECORDS.items()])


@click.command(cls=ListsAttacks)
@click.option("--model", required=True, help=NAMED, shell_complete=choices.models)
@click.option("--vote", default="softmax", help="softmax, voting or logits.", shell_complete=choices.votes)
@images(None)
@click.option("--norm", default="Linf", help="Linf or L2.", shell_complete=choices.norms)
@click.option("--eps", required=True, help=EPS)
@within
@click.option(
    "--curve",
    is_flag=True,
    help=f"For each image the smallest radius up to --eps at which an attack succeeds.  [attacks: {CURVE_ATTACKS}]",
)
@click.option(
    "--attacks",
    default="autoattack,mora",
    help="Comma-separated: those below, and torchattacks:PGD; with options, as mora?steps=50.",
    shell_complete=choices.attacks,
)
@click.option("--cascade", is_flag=True, help="An image that an attack has fooled is not attacked by the next.")
@click.option("--batch-size", type=int, default=250)
@click.option("--shard-size", type=int, default=250, help="Images of every task.")
@click.option("--seed", type=int, default=0)
@click.option("--draws", type=int, default=1, help="Forward passes by which the judge decides, of a random model.")
@click.option("--eot-iter", type=int, help="Draws of every iterate, of a random model.")
@click.option(
    "--amp",
    is_flag=True,
    help="Craft in mixed precision, where that is measured to be faster and shows the same; the judge does not.",
)
@click.option(
    "--tune",
    is_flag=True,
    help="Craft by recorded (CUDA graphs) or compiled passes, where they are measured to be faster and show the same: "
    "`ensemble-attacks tune` says more.",
)
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder.  [default: one of its own in runs/]")
@planned
@tracked
@places
@machines
def evaluate(
    model: str,
    vote: str,
    eps: str,
    curve: bool,
    attacks: str,
    seed: int,
    out: Path | None,
    model_dir: str | None,
    data_dir: str,
    download: bool,
    engine: str,
    workers: int | None,
    device: str,
    options: tuple[str, ...],
    threads: int | None,
    dry_run: bool,
    log: str | None,
    **settings: Any,
) -> None:
    """Attack a model, judge the images, print the comparison. The same command again goes on where it was stopped."""
    from ensemble_attacks.cli.drive import begin
    from ensemble_attacks.evaluation.manifest import manifest_of
    from ensemble_attacks.evaluation.settings import Sweep

    if curve and click.get_current_context().get_parameter_source("attacks") is ParameterSource.DEFAULT:
        attacks = CURVE_ATTACKS
    names = [name.strip() for name in attacks.split(",") if name.strip()]
    if not names:
        raise ValueError("attacks is empty: name at least one, such as --attacks autoattack,mora")
    names = [MINIMAL * (curve and not name.startswith(MINIMAL)) + name for name in names]
    check_machine(engine, workers, device, options, threads)
    check_log(log)
    check_out(out)
    given = {"models": model, "votes": vote, "eps": eps, "seeds": seed, "attacks": names, **settings}
    manifest = manifest_of(Sweep.of(given, "the command"), model_dir=model_dir, data_dir=data_dir, download=download)
    machine: dict[str, Any] = {"engine": engine, "workers": workers, "device": device, "options": options}
    begin(manifest, out, dry_run=dry_run, log=log, threads=threads, **machine)


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder.  [default: one of its own in runs/]")
@planned
@tracked
@places
@machines
def sweep(
    config: Path,
    out: Path | None,
    model_dir: str | None,
    data_dir: str,
    download: bool,
    dry_run: bool,
    log: str | None,
    **machine: Any,
) -> None:
    """Evaluate what a TOML file describes: models x votes x eps x seeds, as `evaluate` does one."""
    from ensemble_attacks.cli.drive import begin
    from ensemble_attacks.evaluation.manifest import manifest_of
    from ensemble_attacks.evaluation.settings import Sweep

    check_machine(**machine)
    check_log(log)
    check_out(out)
    manifest = manifest_of(Sweep.read(config), model_dir=model_dir, data_dir=data_dir, download=download)
    begin(manifest, out, dry_run=dry_run, log=log, **machine)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@elsewhere
@tracked
@machines
def resume(run: Path, model: str | None, dataset: str | None, log: str | None, **machine: Any) -> None:
    """Go on with a run; units that were given up are tried again."""
    from ensemble_attacks.cli.drive import drive
    from ensemble_attacks.evaluation.ledger import Ledger
    from ensemble_attacks.evaluation.origins import placed_anew

    check_machine(**machine)
    check_log(log)
    ledger = Ledger(run).go_on()
    if model or dataset:
        ledger = Ledger(run, placed_anew(ledger.manifest, model, dataset))
    ledger.retry_failed()
    drive(ledger, log=log, **machine)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def status(run: Path) -> None:
    """How far a run is, and what failed: also what is running and since when, the rate, and the results so far."""
    from ensemble_attacks.cli.status import print_status

    print_status(run)
