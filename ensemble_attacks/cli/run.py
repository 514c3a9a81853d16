"""Define the commands ``evaluate``, ``sweep``, ``resume`` and ``status``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from tqdm import tqdm

from ensemble_attacks.attacks.registry import RECORDS
from ensemble_attacks.cli.options import (
    NAMED,
    WIDE,
    check_machine,
    check_out,
    console,
    elsewhere,
    images,
    key_value,
    machines,
    places,
    shown,
)
from ensemble_attacks.errors import plain
from ensemble_attacks.evaluation.audit import progress
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.manifest import manifest_of, run_identity
from ensemble_attacks.evaluation.origins import placed_anew
from ensemble_attacks.evaluation.settings import Sweep
from ensemble_attacks.evaluation.suite import PIPELINES
from ensemble_attacks.evaluation.summary import called, lacking, run_digest, seconds_of
from ensemble_attacks.evaluation.units import CLEAN, count_chains, seed_said

ATTACKS = [name for name in RECORDS if name in PIPELINES or RECORDS[name].make]  # and what other packages register


@click.command()
@click.option("--model", required=True, help=NAMED)
@click.option("--vote", default="softmax", help="softmax, voting or logits.")
@images(None)
@click.option("--norm", default="Linf", help="Linf or L2.")
@click.option("--eps", type=float, required=True, help="Radius of the ball, in pixel units of [0, 1].")
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
    check_machine(engine, workers, device, options)
    check_out(out)
    given = {"models": model, "votes": vote, "eps": eps, "seeds": seed, "attacks": names, **settings}
    manifest = manifest_of(Sweep.of(given, "the command"), model_dir=model_dir, data_dir=data_dir, download=download)
    _run(manifest, out, engine=engine, workers=workers, device=device, options=options)


@click.command()
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
    check_machine(**machine)
    check_out(out)
    manifest = manifest_of(Sweep.read(config), model_dir=model_dir, data_dir=data_dir, download=download)
    _run(manifest, out, **machine)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@elsewhere
@machines
def resume(run: Path, model: str | None, dataset: str | None, **machine: Any) -> None:
    """Go on with a run; units that were given up are tried again."""
    check_machine(**machine)
    ledger = Ledger(run).go_on()
    if model or dataset:
        ledger = Ledger(run, placed_anew(ledger.manifest, model, dataset))
    ledger.retry_failed()
    _drive(ledger, **machine)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def status(run: Path) -> None:
    """How far a run is, and what failed: print the units that are done, running, killed, failed or damaged."""
    ledger = Ledger(run)
    found = progress(ledger)
    console.print(f"{found['done']} of {found['all']} units done", highlight=False)
    if found["hours_left"]:
        console.print(f"{found['per_hour']:,.0f} an hour, {found['hours_left']:.1f} hours left", highlight=False)
    if found["state"] in ("stopped", "killed"):
        console.print(f"{found['state']}: resume with `ensemble-attacks resume {plain(run)}`", **WIDE)
    for name in found["running"]:
        console.print(f"running: {plain(name)}", **WIDE)
    for name in found["killed"]:
        console.print(f"killed: {plain(name)}; `ensemble-attacks resume {plain(run)}` goes on", **WIDE)
    for failure in found["failed"]:
        console.print(f"failed {failure['failures']} times: {plain(failure['unit'])}: {plain(failure['error'])}", **WIDE)
    for name in found["quarantined"]:
        console.print(f"damaged, in quarantine: {plain(name)}", **WIDE)
    if found["state"] == "finished":
        console.print(f"digest {run_digest(ledger)}", highlight=False)


def _run(manifest: dict[str, Any], out: Path | None, **machine: Any) -> None:
    _drive(Ledger(out or Path("runs") / run_identity(manifest), manifest), **machine)


def _drive(ledger: Ledger, engine: str, workers: int, device: str, options: tuple[str, ...]) -> None:
    given: dict[str, Any] = dict(key_value(text) for text in options) | {"devices": device.split(",")}
    given |= {"workers": workers} if engine == "local" else {}
    total = count_chains(ledger.manifest)
    with tqdm(total=total, unit="task", disable=None if total > 1 else True, leave=False) as bar:
        try:
            summary = run(ledger, engine=engine, report=lambda chain: bar.update(), **given)
        except (KeyboardInterrupt, SystemExit) as stopped:
            again = f"ensemble-attacks resume {plain(ledger.folder)}"
            console.print(f"\nStopped: the same command, or `{again}`, goes on.", **WIDE)
            sys.exit(stopped.code if isinstance(stopped, SystemExit) else 130)
    spent = seconds_of(ledger)
    for cell in summary["cells"]:
        console.print(_table(cell, spent))
    console.print(f"Stored in {plain(ledger.folder)}", **WIDE)
    console.print(f"digest {run_digest(ledger)}", **WIDE)
    if quarantined := ledger.quarantined():
        console.print(
            f"{len(quarantined)} damaged files are in {plain(ledger.folder)}/quarantine; what they held was computed anew.",
            **WIDE,
        )
    missing = [name for cell in summary["cells"] for name in cell.get("missing", [])]
    for name in missing:
        console.print(f"Given up: {plain(name)} (ensemble-attacks status {plain(ledger.folder)})", **WIDE)
    for line in lacking(ledger.manifest, summary):
        console.print(plain(line), **WIDE)
    if missing:
        sys.exit(1)


TOLD = {"outside": "outside", "disagreement": "in disagreement"}  # what stands beside a share


def _table(cell: dict[str, Any], spent: dict[str, float]) -> Table:
    title = f"{cell['model']}, {cell['vote']}, {cell['dataset']}, {cell['norm']} {cell['eps']:g}, {cell['n']} images"
    table = Table(title=shown(title + seed_said(cell["seed"])))
    columns = ("attack", "robust %", "95% interval", "invalid", "forwards / image", "backwards / image", "seconds")
    for column in columns:
        table.add_column(column, justify="left" if column == "attack" else "right")

    def passes(row: dict[str, Any]) -> list[str]:
        return [f"{row[kind]:.1f}" if kind in row else "" for kind in ("forwards_per_image", "backwards_per_image")]

    def add(name: str, row: dict[str, Any]) -> None:
        for stage, so_far in row.get("stages", {}).items():
            share = f"{100 * so_far['robust'] / row['n']:.1f}"
            table.add_row(f"  after {shown(stage)}", share, "", "", *passes(so_far), style="dim")
        low, high = row["interval"]
        told = "".join(f" ({row[kind]} {word})" for kind, word in TOLD.items() if row.get(kind))
        key = " ".join(str(cell[part]) for part in ("model", "vote", "eps", "seed")) + f" {name}"
        seconds = f"{spent[key]:.1f}" if key in spent and name != CLEAN else ""
        table.add_row(
            *(
                shown(called(name, row, cell["n"])),
                f"{100 * row['accuracy']:.1f}{told}",
                f"{100 * low:.1f} - {100 * high:.1f}",
            ),
            *(str(row["invalid"]), *passes(row), seconds),
        )

    if cell["clean"] is not None:
        add(CLEAN, {key: value for key, value in cell["clean"].items() if "per_image" not in key})
    for name, row in cell["attacks"].items():
        add(name, row)
    if "worst_case" in cell:
        add("worst case", cell["worst_case"])
    return table
