"""Drive a run for the command line: say what will be done and what it may cost, do it, print what was found."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm

from ensemble_attacks.cli.console import WIDE, console, shown
from ensemble_attacks.cli.options import key_value
from ensemble_attacks.errors import plain
from ensemble_attacks.evaluation.curves import SHARES, Curve, curves_of
from ensemble_attacks.evaluation.engines import run, terminable, unfinished
from ensemble_attacks.evaluation.estimate import Plan, plan_of
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.manifest import run_identity
from ensemble_attacks.evaluation.summary import called, lacking, run_digest, seconds_of
from ensemble_attacks.evaluation.tracking import log_run
from ensemble_attacks.evaluation.units import CLEAN, chain_of, count_chains, radius_said, seed_said

SMALL = 64  # pixels a side of images whose networks are too small for several threads


def begin(
    manifest: dict[str, Any], out: Path | None, *, dry_run: bool, log: str | None, threads: int | None, **machine: Any
) -> None:
    """Begin a run, or go on with it; with ``dry_run`` only say what it would be."""
    folder = out or Path("runs") / run_identity(manifest)
    if dry_run:
        set_threads(manifest, threads)
        devices = machine["device"].split(",")
        console.print(_said(plan_of(manifest, devices[0]), manifest, machine["workers"] or len(devices)), **WIDE)
        console.print(f"Nothing was run; it would be stored in {plain(folder)}", **WIDE)
        return
    drive(Ledger(folder, manifest), log=log, threads=threads, **machine)


def set_threads(manifest: dict[str, Any], threads: int | None) -> None:
    """Set the number of torch's threads: that which is given, else the environment's, else one where images are small.

    On small networks threads wait for each other, on a machine that is busy ten times as long as they compute.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ and plan_of(manifest, None).pixels <= SMALL:
        torch.set_num_threads(1)


def drive(
    ledger: Ledger,
    engine: str,
    workers: int | None,
    device: str,
    options: tuple[str, ...],
    threads: int | None = None,
    log: str | None = None,
) -> None:
    """Run what is left of a run, print its tables, tell the tracker ``log``; exit with 1 where something was given up."""
    devices = device.split(",")
    given: dict[str, Any] = dict(key_value(text) for text in options) | {"devices": devices}
    given |= {"workers": workers} if engine == "local" else {}
    total = count_chains(ledger.manifest)
    set_threads(ledger.manifest, threads)
    again = f"ensemble-attacks resume {plain(ledger.folder)}"
    try:
        with terminable():  # from here on there is a run to go on with
            if any(unfinished(ledger, chain_of(ledger.manifest, index)) for index in range(total)):
                plan = plan_of(ledger.manifest, devices[0] if engine == "local" else None, ledger)
                console.print(_said(plan, ledger.manifest, workers or len(devices)), **WIDE)
            several = total > 1 or (workers or 1) > 1
            with tqdm(total=total, unit="task", disable=None if several else True, leave=False) as bar:
                summary = run(ledger, engine=engine, report=lambda chain: bar.update(), **given)
    except (KeyboardInterrupt, SystemExit) as stopped:
        console.print(f"\nStopped: the same command, or `{again}`, goes on.", **WIDE)
        sys.exit(stopped.code if isinstance(stopped, SystemExit) else 130)
    spent = seconds_of(ledger)
    for cell in summary["cells"]:
        console.print(table_of(cell, spent))
    if not any("missing" in cell for cell in summary["cells"]):
        for own, curves, _ in curves_of(ledger):
            console.print(_curve_table(own.title, curves))
    if len(summary["cells"]) > 1:
        console.print(_overview(summary["cells"]))
    console.print(f"Stored in {plain(ledger.folder)}", **WIDE)
    console.print(f"digest {run_digest(ledger)}", **WIDE)
    if log is not None:
        log_run(ledger, summary, log)
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


def _said(plan: Plan, manifest: dict[str, Any], workers: int) -> str:
    """Return what a plan says, in two or three lines."""
    sweep = manifest["sweep"]
    counts = ((len(sweep[key]), word) for key, word in (("models", "model"), ("votes", "vote"), ("eps", "eps")))
    cells = " x ".join(f"{count} {word}{'s' if count > 1 and word != 'eps' else ''}" for count, word in counts)
    seeds = f" x {len(sweep['seeds'])} seeds" if len(sweep["seeds"]) > 1 else ""
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''} of torch (--threads)"
    lines = [f"Plan: {cells}{seeds}, {sweep['n']} images, {', '.join(sweep['attacks'])}; {threads}"]
    if plan.units_left < plan.units:
        lines.append(f"      {plan.units - plan.units_left} of {plan.units} units are done already")
    most = f"      at most {plan.passes:,} passes of an image ({plan.passes_per_image:,} for one that holds out)"
    most += f", and those of {', '.join(plan.unknown)}" if plan.unknown else ""
    if plan.per_second:
        time = duration(plan.passes / plan.per_second / max(1, min(workers, plan.tasks)))
        most += f": {time} at {plan.per_second:,.0f} a second{', without these' if plan.unknown else ''}"
    return "\n".join([*lines, f"{most}; fooled images cost less"])


def duration(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


TOLD = {
    "outside": "outside",
    "disagreement": "in disagreement",
    "zero_gradients": "without gradient",
}  # what stands beside a share


def table_of(cell: dict[str, Any], spent: dict[str, float]) -> Table:
    """Return the table of one cell of a summary: a row for each attack."""
    title = f"{cell['model']}, {cell['vote']}, {cell['dataset']}, {radius_said(cell)}, {cell['n']} images"
    table = Table(title=shown(title + seed_said(cell["seed"])))
    columns = ("attack", "robust %", "95% interval", "invalid", "forwards / image", "backwards / image", "seconds")
    for column in columns:
        table.add_column(column, justify="left" if column == "attack" else "right", overflow="fold")

    def passes(row: dict[str, Any]) -> list[str]:
        return [f"{row[kind]:.1f}" if kind in row else "" for kind in ("forwards_per_image", "backwards_per_image")]

    def add(name: str, row: dict[str, Any]) -> None:
        for stage, so_far in row.get("stages", {}).items():
            share = f"{100 * so_far['robust'] / row['n']:.1f}"
            table.add_row(f"  after {shown(stage)}", share, "", "", *passes(so_far), style="dim")
        low, high = row["interval"]
        told = "".join(f" ({row[kind]} {word})" for kind, word in TOLD.items() if row.get(kind))
        if "worst_of_draws" in row:
            told += f" ({100 * row['worst_of_draws']:.1f} in the worst of {row['draws']} draws)"
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


def _overview(cells: list[dict[str, Any]]) -> Table:
    """Return one table of all cells: a row each, robust accuracy by attack."""
    attacks = list(dict.fromkeys(name for cell in cells for name in cell["attacks"]))
    table = Table(title="robust % of all cells")
    for column in ("model", "vote", "ball", "clean", *attacks, "worst case"):
        table.add_column(shown(column), justify="left" if column in ("model", "vote", "ball") else "right", overflow="fold")
    for cell in cells:
        rows = (cell["clean"], *(cell["attacks"].get(name) for name in attacks), cell.get("worst_case"))
        figures = ("" if row is None else f"{100 * row['accuracy']:.1f}" for row in rows)
        ball = f"{radius_said(cell)}{seed_said(cell['seed'])}"
        table.add_row(*map(shown, (cell["model"], cell["vote"], ball)), *figures)
    return table


def _curve_table(title: str, curves: list[Curve]) -> Table:
    """Return the radii at which robust accuracy has fallen to some shares."""
    table = Table(title=shown(f"{title}: the radius at which so many are robust at most"))
    table.add_column("attack", overflow="fold")
    for share in SHARES:
        table.add_column(f"{100 * share:.0f}%", justify="right")
    for curve in curves:
        radii = [curve.radius(share) for share in SHARES]
        table.add_row(shown(curve.attack), *(f"{radius:.4f}" if radius < float("inf") else "more" for radius in radii))
    return table
