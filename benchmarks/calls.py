"""What a run loses when it is killed inside a system call: kill -9 in each of those that a write makes, one after the other.

    python benchmarks/calls.py

A process writes a run (manifest, units, marks, summary) from results that are known, and strace kills it as it enters the
first, second, ... call of each kind; the run is then gone on with, and its summary compared byte for byte. Needs strace.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from ensemble_attacks.evaluation.audit import verify
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.ledger import SUMMARY, Ledger, Result
from ensemble_attacks.evaluation.manifest import manifest_of
from ensemble_attacks.evaluation.settings import Sweep
from ensemble_attacks.evaluation.summary import summarise
from ensemble_attacks.evaluation.units import chains_of

SWEEP = Sweep(("gal_convnet_3",), (0.12,), ("torchattacks:FGSM",), n=4, shard_size=4)
CALLS = ("mkdir", "rename", "fsync", "unlink", "write", "openat", "close")
MOST = 400  # calls of one kind


def write(folder: Path, manifest: dict[str, Any], results: list[Result], go: Any) -> None:
    """Write a whole run, once told to, without attacking anything."""
    go.wait()
    ledger = Ledger(folder, manifest)
    with ledger.driving():
        for unit, result in zip(chains_of(ledger.manifest)[0], results, strict=True):
            with ledger.running(unit):
                ledger.write(unit, result.tensors, result.info)
        summarise(ledger)


def killed(folder: Path, manifest: dict[str, Any], results: list[Result], call: str, number: int) -> bool:
    """Write a run in a process that is killed in one call; return whether it came so far."""
    context = multiprocessing.get_context("fork")
    go = context.Event()
    process = context.Process(target=write, args=(folder, manifest, results, go))
    process.start()
    inject = f"inject={call}:signal=KILL:when={number}"
    tracer = subprocess.Popen(
        ["strace", "-qq", "-f", "-o", os.devnull, "-e", f"trace={call}", "-e", inject, "-p", str(process.pid)]
    )
    status = Path(f"/proc/{process.pid}/status")
    while "TracerPid:\t0" in status.read_text():
        time.sleep(0.002)
    go.set()
    process.join()
    tracer.wait()
    return process.exitcode != 0


@click.command()
@click.option("--calls", default=",".join(CALLS), show_default=True)
def main(calls: str) -> None:
    manifest = manifest_of(SWEEP, model_dir=None, data_dir="data")
    place = Path(tempfile.mkdtemp())
    run(whole := Ledger(place / "whole", manifest))
    expected = (place / "whole" / SUMMARY).read_bytes()
    results = [result for unit in chains_of(manifest)[0] if (result := whole.read(unit)) is not None]
    kills, different, lost, left = Counter[str](), 0, 0, 0
    for call in calls.split(","):
        for number in range(1, MOST):
            folder = place / "run"
            if not killed(folder, manifest, results, call, number):
                shutil.rmtree(folder)
                break
            kills[call] += 1
            run(ledger := Ledger(folder, manifest))
            different += (folder / SUMMARY).read_bytes() != expected
            if number % 10 == 1:  # the summary is of everything; this asks the model again
                lost += any(finding["differ"] != 0 for finding in verify(ledger))
            left += len(list(folder.rglob(".*.tmp"))) + len(ledger.quarantined())
            shutil.rmtree(folder)
        click.echo(f"{call}: {kills[call]} kills")
    shutil.rmtree(place)
    click.echo(
        f"{kills.total()} kills inside {len(kills)} kinds of call: {different} summaries differ, {lost} runs do not verify, "
        f"{left} temporary or damaged files are left"
    )


if __name__ == "__main__":
    main()
