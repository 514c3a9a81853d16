"""What files and options of strangers cost: seconds, memory, and how each command ends, one process for each.

    python benchmarks/malformed.py --kinds folders,bundles,cards,files,options

Every damaged folder, bundle, card, file and bad option of the tests is put to the command that would read it, in a process
of its own that has everything imported. Counted are tracebacks, hangs (killed after a minute), more than 5 seconds and
growth by more than 500 MB. Seconds are the process's own; a machine that others work on takes longer by the clock.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import torch

from benchmarks.options import Benchmark, named
from benchmarks.tables import save_table
from defenses import load_model
from ensemble_attacks.cli.group import COMMANDS
from ensemble_attacks.cli.group import main as command
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.external import export_robustbench
from tests.evaluation.malformed import CARD, bundles, cards, folders, named_files
from tests.evaluation.test_ledger import ledger_in
from tests.test_bad_options import OPTIONS

HANGS, SLOW, LARGE = 60, 5.0, 500.0  # seconds, seconds, MB
Case = tuple[str, Callable[[], object], list[str]]  # a name, what makes it, and the command


class Ended(NamedTuple):
    """A record of how a command ended."""

    code: int
    seconds: float
    clock: float
    megabytes: float
    output: str


def resident() -> float:
    """Return the memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def in_process(arguments: list[str], place: Path) -> Ended:
    """Run a command in a fork of this process, which is killed if it hangs."""
    told, began = place / "told", time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, str(resident()).encode())  # less than its parent's, of which files that are mapped are no part
        output = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            command.main(arguments, prog_name="ensemble-attacks")
        except SystemExit as ended:
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        except BaseException as error:
            os.write(2, f"Traceback: {error!r}".encode())
            os._exit(99)
        os._exit(0)
    held = float(os.read(reading, 100))
    os.close(reading)
    os.close(writing)
    clock = threading.Timer(HANGS, os.kill, (child, signal.SIGKILL))
    clock.start()
    _, status, used = os.wait4(child, 0)
    clock.cancel()
    seconds = used.ru_utime + used.ru_stime
    grown = max(0.0, used.ru_maxrss / 1024 - held)
    return Ended(
        os.waitstatus_to_exitcode(status), seconds, time.monotonic() - began, grown, told.read_text(errors="replace")
    )


def of_folders(place: Path) -> Iterator[Case]:
    run(ledger_in(finished := place / "finished", attacks=("torchattacks:FGSM",), n=4, shard_size=4))
    for name, (path, damage) in folders(finished).items():

        def make(path: Path = path, damage: Callable[[Path], object] = damage) -> None:
            shutil.rmtree(place / "run", ignore_errors=True)
            shutil.copytree(finished, place / "run", symlinks=True)
            damage(place / "run" / path.relative_to(finished))

        for reads in ("status", "verify"):
            yield f"{name}: {reads}", make, [reads, str(place / "run")]


def of_bundles(place: Path) -> Iterator[Case]:
    run(ledger_in(finished := place / "finished", attacks=("torchattacks:FGSM",), n=4, shard_size=4))
    bundle = export_robustbench(finished, place / "bundle", partial=True)
    for name, damage in bundles().items():

        def make(damage: Callable[[Path], object] = damage) -> None:
            shutil.rmtree(place / "damaged", ignore_errors=True)
            shutil.copytree(bundle, place / "damaged")
            damage(place / "damaged")

        yield name, make, ["verify", str(place / "damaged"), "--model", CARD, "--recraft", "0"]


def of_cards(place: Path) -> Iterator[Case]:
    arguments = ["evaluate", "--model", CARD, "--dataset", "digits", "--model-dir", str(place / "models"), "--eps", "0.1"]
    arguments += ["--n", "2", "--attacks", "torchattacks:FGSM", "--out", str(place / "out")]
    for name, make in cards(place / "models").items():
        yield name, make, arguments


def of_files(place: Path) -> Iterator[Case]:
    for name, (make, arguments) in named_files(place).items():
        yield name, make, arguments


def of_options(place: Path) -> Iterator[Case]:
    for words, options in OPTIONS.items():
        for option, values in options.items():
            for value in values:
                out = ["--out", str(place / "out")] if words[0] in ("evaluate", "train") and option != "--out" else []
                yield (
                    f"{words[0]} {option} {value[:20]!r}",
                    lambda: None,
                    [*words, *out, *([option] if option else []), value],
                )


KINDS = {"folders": of_folders, "bundles": of_bundles, "cards": of_cards, "files": of_files, "options": of_options}


@click.command(cls=Benchmark)
@click.option("--kinds", default=",".join(KINDS), help="Comma-separated.  [default: all]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("malformed"), show_default=True)
def main(kinds: str, out: Path) -> None:
    torch.set_num_threads(1)
    for name in COMMANDS:  # all modules, lest the first case pay for them
        command.get_command(click.Context(command), name)
    load_model(CARD, dataset="digits")
    rows = []
    for kind in named(kinds, KINDS, "--kinds"):
        ended: dict[str, Ended] = {}
        with tempfile.TemporaryDirectory() as folder:
            for name, make, arguments in KINDS[kind](Path(folder)):
                make()
                ended[name] = found = in_process(arguments, Path(folder))
                if found.code not in (0, 1, 2) or found.seconds > SLOW or found.megabytes > LARGE:
                    click.echo(f"{kind}, {name}: {found[:4]} {found.output[-200:]}")
        slowest = max(ended, key=lambda name: ended[name].seconds)
        largest = max(ended, key=lambda name: ended[name].megabytes)
        row = {"kind": kind, "tried": len(ended)}
        row |= {"tracebacks": sum("Traceback" in one.output for one in ended.values())}
        row |= {"hangs": sum(one.code == -signal.SIGKILL for one in ended.values())}
        row |= {"over 5 s": sum(one.seconds > SLOW for one in ended.values())}
        row |= {"over 500 MB": sum(one.megabytes > LARGE for one in ended.values())}
        row |= {"most s": ended[slowest].seconds, "most s by the clock": max(one.clock for one in ended.values())}
        row |= {"most MB": ended[largest].megabytes, "slowest": slowest, "largest": largest}
        rows.append(row)
        click.echo(
            " | ".join(f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        )
        sys.stdout.flush()
    save_table(rows, out)


if __name__ == "__main__":
    main()
