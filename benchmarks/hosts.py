"""What two hosts lose of each other's work on one folder: each in a space of pids and a host name of its own, one is killed.

    python benchmarks/hosts.py --rounds 20

In every round two hosts drive the same run; the first is killed (kill -9) at random instants and started again, twice. The
second must end as if nothing had happened, and the summary be the same byte for byte. Needs root, for the name spaces.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import random
import shutil
import signal
import socket
import tempfile
import time
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import click

from benchmarks.kills import SWEEP, start
from ensemble_attacks.evaluation.audit import verify
from ensemble_attacks.evaluation.ledger import SUMMARY, Ledger
from ensemble_attacks.evaluation.manifest import manifest_of
from ensemble_attacks.files import machine

NEW_PIDS, NEW_NAMES, DIES_WITH_PARENT = 0x20000000, 0x04000000, 1  # of unshare and prctl


def host(name: str, folder: Path, manifest: dict[str, Any]) -> None:
    """Drive a run as the only process of a host of this name; it is killed with the process that calls this."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(NEW_PIDS | NEW_NAMES):
        raise OSError(ctypes.get_errno(), "unshare: run this as root")
    if child := os.fork():
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    library.prctl(DIES_WITH_PARENT, signal.SIGKILL)
    socket.sethostname(name)
    vars(platform)["_uname_cache"] = None  # what the parent knew of itself
    machine.cache_clear()
    try:
        start(folder, manifest, 1)
    except BaseException as error:  # told by the exit code
        click.echo(f"{name}: {error!r}")
        os._exit(1)
    os._exit(0)


def begun(name: str, folder: Path, manifest: dict[str, Any]) -> ForkProcess:
    process = multiprocessing.get_context("fork").Process(target=host, args=(name, folder, manifest))
    process.start()
    return process


@click.command()
@click.option("--rounds", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(rounds: int, seed: int) -> None:
    random.seed(seed)
    manifest = manifest_of(SWEEP, model_dir=None, data_dir="data")
    place = Path(tempfile.mkdtemp())
    began = time.perf_counter()
    start(place / "whole", manifest, 1)
    seconds = time.perf_counter() - began
    expected = (place / "whole" / SUMMARY).read_bytes()
    killed = failed = different = unsound = damaged = 0
    for _ in range(rounds):
        folder = place / "run"
        first, second = begun("first", folder, manifest), begun("second", folder, manifest)
        for _ in range(2):
            time.sleep(random.uniform(0, seconds))
            killed += first.is_alive()
            first.kill()
            first.join()
            first = begun("first", folder, manifest)
        for process in (first, second):
            process.join()
            failed += process.exitcode != 0
        ledger = Ledger(folder)
        different += (folder / SUMMARY).read_bytes() != expected
        unsound += any(finding["differ"] != 0 for finding in verify(ledger))
        damaged += len(ledger.quarantined())
        shutil.rmtree(folder)
    shutil.rmtree(place)
    click.echo(
        f"{rounds} rounds of two hosts, {killed} kills before the end: {failed} hosts failed otherwise, {different} "
        f"summaries differ, {unsound} runs do not verify, {damaged} files damaged"
    )


if __name__ == "__main__":
    main()
