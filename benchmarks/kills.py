"""What a run loses when it is killed: kill -9 at random instants, run again, compare the summaries byte for byte.

    python benchmarks/kills.py --kills 200 --workers 1

With ``--coordinators``, so many processes drive the same run at once, and all of them are killed at the same instant.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.ledger import SUMMARY, Ledger
from ensemble_attacks.evaluation.manifest import manifest_of
from ensemble_attacks.evaluation.settings import Sweep
from ensemble_attacks.evaluation.units import chains_of

SWEEP = Sweep(
    ("gal_convnet_3",), (0.12,), ("torchattacks:PGD", "ea-apgd-ce"), votes=("softmax", "voting"), n=30, shard_size=10
)


def start(folder: Path, manifest: dict[str, Any], workers: int) -> None:
    run(Ledger(folder, manifest), workers=workers)


@click.command()
@click.option("--kills", default=200, show_default=True)
@click.option("--workers", default=1, show_default=True)
@click.option("--coordinators", default=1, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(kills: int, workers: int, coordinators: int, seed: int) -> None:
    random.seed(seed)
    manifest = manifest_of(SWEEP, model_dir=None, data_dir="data")
    units = sum(map(len, chains_of(manifest)))
    # one process is forked from this one, which has everything imported; several are started by the run itself
    context = multiprocessing.get_context("fork")
    whole = Path(tempfile.mkdtemp())
    began = time.perf_counter()
    start(whole / "run", manifest, workers)
    seconds = time.perf_counter() - began
    expected = (whole / "run" / SUMMARY).read_bytes()
    different = corrupted = recomputed = landed = 0
    for _ in range(kills):
        folder = Path(tempfile.mkdtemp())
        processes = [context.Process(target=start, args=(folder / "run", manifest, workers)) for _ in range(coordinators)]
        for process in processes:
            process.start()
        time.sleep(random.uniform(0, seconds))
        landed += any(process.is_alive() for process in processes)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        before = len(list((folder / "run" / "units").glob("*.json")))
        marks = len(list((folder / "run" / "running").glob("*.json")))
        start(folder / "run", manifest, workers)
        ledger = Ledger(folder / "run")
        different += (folder / "run" / SUMMARY).read_bytes() != expected
        corrupted += len(ledger.quarantined())
        recomputed += marks
        assert before <= units
        shutil.rmtree(folder)
    click.echo(
        f"{units} units, {coordinators} x {workers} processes, {seconds:.1f} s undisturbed; {kills} kills, {landed} before "
        f"the end: {different} summaries differ, {corrupted} files corrupted, {recomputed / kills:.2f} units computed again "
        "per kill"
    )


if __name__ == "__main__":
    main()
