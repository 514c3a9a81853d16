"""Print how far a run is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ensemble_attacks.cli.console import WIDE, console
from ensemble_attacks.cli.drive import duration
from ensemble_attacks.errors import plain
from ensemble_attacks.evaluation.audit import progress, results_so_far
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.summary import run_digest


def print_status(run: Path) -> None:
    """Print the units that are done, running, killed, failed or damaged, and what the attacks have left robust so far."""
    ledger = Ledger(run)
    found = progress(ledger)
    console.print(f"{found['done']} of {found['all']} units done", highlight=False)
    if found["hours_left"]:
        left = duration(3600 * found["hours_left"])
        console.print(f"{found['per_hour']:,.0f} units an hour, {left} left at that rate", highlight=False)
    _print_results(ledger)
    if found["state"] in ("stopped", "killed"):
        console.print(f"{found['state']}: resume with `ensemble-attacks resume {plain(run)}`", **WIDE)
    for name, seconds in found["running"].items():
        console.print(f"running for {duration(seconds)}: {plain(name)}", **WIDE)
    for name in found["killed"]:
        console.print(f"killed: {plain(name)}; `ensemble-attacks resume {plain(run)}` goes on", **WIDE)
    for failure in found["failed"]:
        console.print(f"failed {failure['failures']} times: {plain(failure['unit'])}: {plain(failure['error'])}", **WIDE)
    for name in found["quarantined"]:
        console.print(f"damaged, in quarantine: {plain(name)}", **WIDE)
    if found["state"] == "finished":
        console.print(f"digest {run_digest(ledger)}", highlight=False)


def _print_results(ledger: Ledger) -> None:
    for cell, rows in results_so_far(ledger):
        said: list[Any] = [f"{name} {100 * robust / n:.1f} ({n})" for name, (robust, n) in rows.items()]
        console.print(f"{plain(cell.title)}: {plain(', '.join(said))}", **WIDE)
