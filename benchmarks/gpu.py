"""What a GPU is needed for: correctness and speed there, and trainings that take a CPU days.

    python benchmarks/gpu.py run --data-dir DIR --out runs/gpu       # all stages, those of most worth first
    python benchmarks/gpu.py run speed cells --data-dir DIR          # some
    python benchmarks/gpu.py run --dry --out runs/dry                # the same stages in minutes, on digits, on a CPU
    python benchmarks/gpu.py pack parts/ --data-dir DIR              # CIFAR-10 in parts small enough to carry
    python benchmarks/gpu.py unpack parts/*.tar --data-dir DIR

A stage is a few chains of jobs, and takes under ten minutes on an H100 or H200; the chains run side by side, as one small
network leaves most of a GPU idle, the jobs of a chain one after another. What still runs after ``--minutes`` is stopped.
The same command again goes on: a job that is done is not run again, and the others resume from what lies in ``--out``.
``records.json`` there holds every job: its stage, command, seconds, device, and the tables that it wrote.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.carry import pack, unpack
from defenses import list_models

HERE = Path(__file__).parent
SHARING = ("table1.py", "masks.py")  # whose runs go on in one folder


@dataclass(frozen=True)
class Place:
    """Where jobs run; ``dry``: in seconds, on digits."""

    out: Path
    data_dir: str
    device: str
    dry: bool

    @property
    def models(self) -> Path:
        return self.out / "models"

    def has(self, model: str, dataset: str) -> bool:
        """Tell whether a model has been trained here, or ships."""
        return model in list_models("digits" if self.dry else dataset, self.models)


@dataclass(frozen=True)
class Training:
    """One call of `defenses.train_model`, when ``start_from``, one of those before it, is there."""

    recipe: str
    minutes: float
    members: int = 8
    network: str = "resnet20"
    start_from: tuple[str, str, int] | None = None  # recipe, network, members
    max_lr: float | None = None
    dataset: str = "cifar10"

    def name(self, recipe: str, network: str, members: int, place: Place) -> str:
        return f"{recipe}_{'convnet' if place.dry else network}_{members}"

    def waits(self, place: Place) -> bool:
        return self.start_from is not None and not place.has(self.name(*self.start_from, place), self.dataset)

    def command(self, place: Place) -> list[str]:
        own = self.name(self.recipe, self.network, self.members, place)
        options: dict[str, Any] = {
            "dataset": "digits" if place.dry else self.dataset,
            "architecture": "convnet" if place.dry else self.network,
            "members": self.members,
            "minutes": self.minutes / 300 if place.dry else self.minutes,
            "amp": not place.dry,
            "start_from": None if self.start_from is None else self.name(*self.start_from, place),
            "max_lr": self.max_lr,
            "data_dir": place.data_dir,
            "device": place.device,
            "model_dir": str(place.models),
            "out": str(place.models / (own if self.dataset == "cifar10" else f"{self.dataset}_{own}")),
        }
        call = f"from defenses import train_model; print(train_model({self.recipe!r}, **{options!r}))"
        return [sys.executable, "-c", call]


@dataclass(frozen=True)
class Script:
    """One benchmark, or ``evaluate`` of the command line: its arguments, those of the dry run, the model that it waits for,
    and whether it reads images."""

    file: str
    arguments: str
    dry_arguments: str
    needs: str | None = None
    reads: bool = True
    dataset: str = "cifar10"

    def waits(self, place: Place) -> bool:
        return self.needs is not None and not place.dry and not place.has(self.needs, self.dataset)

    def command(self, place: Place) -> list[str]:
        arguments = (self.dry_arguments if place.dry else self.arguments).format(models=place.models).split()
        of_package = self.file == "evaluate"
        out = place.out / Path(self.file).stem
        if self.file not in SHARING:
            out /= hashlib.md5(" ".join(arguments).encode()).hexdigest()[:8]
        where = ["--device", place.device, "--out", str(out)] + (["--data-dir", place.data_dir] if self.reads else [])
        run = ["-m", "ensemble_attacks", "evaluate"] if of_package else [str(HERE / self.file)]
        return [sys.executable, *run, *arguments, *where]


Job = Training | Script
DRY_MASKS = (
    "--backbone standard_convnet_3 --dataset digits --depth 4 --width 8 --rates 1e-4 --checkpoints 2 --n 4 --pgd-steps 1"
)
DRY_CELLS = "--n 250 --attacks pgd --table-only"
DRY_SPEED = "--models resnet20*1 --n 2 --steps 1 --repetitions 1"
DRY_FRONT = "--model frontend_convnet_3 --dataset digits --eps 0.1 --n 1 --draws 1 --eot-iter 1"
DRY_RANDOM = "--model multiresolution_convnet_1 --dataset digits --n 1 --eps 0.05 --attacks torchattacks:FGSM --draws 2"
MIXED = "--backbone standard_mixed_3"
EIGHT, THREE, EVERYWHERE = ("standard", "resnet20", 8), ("standard", "mixed", 3), "multiresolution_resnet18_1"
ROBUST = ("dverge_at", "resnet32", 3)
DRAWN = "--draws 10 --eot-iter 20 --batch-size 100 --n 100"
RANDOM = f"--model {EVERYWHERE} --eps {8 / 255} {DRAWN}"


def cells(*names: str) -> Script:
    """The columns of Table 1 that take a CPU days, of some of its cells, at 500 images."""
    arguments = f"--n 500 --attacks autoattack,a3 --model-dir {{models}} --cells {','.join(names)}"
    return Script("table1.py", arguments, DRY_CELLS, needs=names[0].partition(":")[0])


def hundred(file: str, arguments: str, dry: str, needs: str) -> Job:
    """A benchmark of a model of CIFAR-100 that is trained here, at the papers' radius."""
    own = f"--model {needs} --dataset cifar100 --model-dir {{models}} --eps {8 / 255} {arguments}"
    return Script(file, own, dry, needs=needs, dataset="cifar100")


def speed(arguments: str) -> Script:
    return Script("speed.py", f"--n 250 {arguments}", DRY_SPEED, reads=False)


STAGES: dict[str, list[list[Job]]] = {  # what no CPU has reached, that of most worth first
    "check": [[Script("devices.py", "--n 100", "--models gal_convnet_3 --attacks mora --n 10")]],
    "speed": [
        [
            speed("--models resnet20*3"),
            speed("--models resnet20*8 --repetitions 3"),
            speed("--models wrn28x10*1 --steps 5 --repetitions 3"),
            speed("--models timm/vit_base_patch16_224 --steps 3 --repetitions 2"),
        ]
    ],
    "dverge_at": [[Training("dverge_at", 9, start_from=EIGHT, max_lr=0.05)]],
    "everywhere_rand": [
        [Script("evaluate", f"{RANDOM} --attacks {attacks}", DRY_RANDOM, needs=EVERYWHERE)]
        for attacks in ("autoattack-rand", "eot-apgd,crossmax-transfer")
    ],
    "everywhere_at": [[Training("multiresolution_at", 9, 1, "resnet18", max_lr=5e-4)]],
    "mixed_masks": [
        [Script("masks.py", f"{MIXED} --member {index} --rates 1e-5,3e-5 --amp", DRY_MASKS, needs="standard_mixed_3")]
        for index in range(3)
    ],
    "cells": [
        [cells("standard_resnet20_8:voting:0.01", "standard_resnet20_8:softmax:0.01", "adp_resnet20_8:softmax:0.01")],
        [cells("gal_resnet20_8:softmax:0.01", "gal_resnet20_8:voting:0.01")],
        [cells("trs_resnet20_8:voting:0.01", "trs_resnet20_8:softmax:0.01")],
        [cells("dverge_resnet20_8:voting:0.01", "dverge_resnet20_8:softmax:0.01")],
    ],
    "cells_at": [[cells("dverge_at_resnet20_8:softmax:0.03", "dverge_at_resnet20_8:voting:0.03")]],
    "cifar100": [  # the rows of 'Ensemble everything everywhere', and of the front end, before plain and robust backbones
        [Training("multiresolution", 9, 1, "resnet18", max_lr=5e-4, dataset="cifar100")],
        [
            Training("standard", 2, 3, "resnet32", dataset="cifar100"),
            Training("frontend", 3, 3, "resnet32", max_lr=3e-6, dataset="cifar100"),
        ],
        [Training("dverge_at", 8, 3, "resnet32", start_from=("standard", "resnet32", 3), max_lr=0.05, dataset="cifar100")],
    ],
    "cifar100_front": [
        [Training("frontend_at", 4, 3, "resnet32", ROBUST, max_lr=1e-5, dataset="cifar100")],
    ],
    "cifar100_rows": [
        [
            hundred("evaluate", f"{DRAWN} --attacks {attacks}", DRY_RANDOM, EVERYWHERE)
            for attacks in ("autoattack-rand", "eot-apgd,crossmax-transfer")
        ],
        *([hundred("frontends.py", "--n 100", DRY_FRONT, f"{front}_resnet32_3")] for front in ("frontend", "frontend_at")),
    ],
}
REACHED: dict[str, list[list[Job]]] = {  # whose results are kept already; run where they are named
    "eight": [
        [Training("standard", 2.2), Training("gal", 6, start_from=EIGHT, max_lr=2e-3)],
        [Training("adp", 5)],
        [Training("trs", 6, start_from=EIGHT, max_lr=2e-3)],
        [Training("dverge", 6.9, start_from=EIGHT, max_lr=0.05)],
    ],
    "mixed": [
        [
            Training("standard", 2, 3, "mixed", max_lr=0.1),
            Training("each_at", 6.5, 3, "mixed", start_from=THREE, max_lr=0.1),
        ],
    ],
    "everywhere": [[Training("multiresolution", 9, 3, "resnet18", max_lr=5e-4)]],
    "masks": [
        [Script("masks.py", "--rates 1e-5,3e-5,3e-6,1e-4 --amp", DRY_MASKS)],
        [Script("masks.py", "--rates 3e-5,1e-5 --no-norm --amp", f"{DRY_MASKS} --no-norm")],
        [Script("masks.py", "--rates 3e-5,1e-5 --temperature 0.2 --amp", f"{DRY_MASKS} --temperature 0.2")],
    ],
}
ALL = STAGES | REACHED


class Records:
    """What has become of every job so far, in a file that is written anew with each."""

    def __init__(self, place: Place) -> None:
        self.path, self.device = place.out / "records.json", named(place.device)
        self.taken: set[str] = set()  # by a chain of this process
        self.jobs: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def done(self, key: str) -> bool:
        return self.jobs.get(key, {}).get("outcome") == "done"

    def book(self, key: str, stage: str, command: Sequence[str], outcome: str, seconds: float) -> None:
        before = self.jobs.get(key, {}).get("seconds", 0.0)
        row = {"stage": stage, "outcome": outcome, "seconds": round(before + seconds, 1), "device": self.device}
        folder = Path(command[command.index("--out") + 1]) if "--out" in command else None
        tables = sorted(str(path.relative_to(self.path.parent)) for path in folder.rglob("*.json")) if folder else []
        self.jobs[key] = {**row, "command": " ".join(command), "tables": tables}
        self.path.write_text(json.dumps(self.jobs, indent=1) + "\n")


def named(device: str) -> str:
    """Return what a device calls itself."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


class Chain:
    """Jobs of a stage, one after another."""

    def __init__(self, stage: str, jobs: Sequence[Job], place: Place, records: Records) -> None:
        self.stage, self.place, self.records = stage, place, records
        keyed = {self._key(job): job for job in jobs}  # dry, several may be the same, also of the chain beside it
        self.jobs = [job for key, job in keyed.items() if not records.done(key) and key not in records.taken]
        records.taken |= keyed.keys()
        self.running: subprocess.Popen[bytes] | None = None
        self.failed = False

    def _key(self, job: Job) -> str:
        return hashlib.md5(" ".join([self.stage, *job.command(self.place)]).encode()).hexdigest()[:8]

    def _log(self) -> Path:
        return self.place.out / "logs" / f"{self._key(self.jobs[0])}.log"

    def turn(self) -> bool:
        """Start what is next; is there anything left to wait for?"""
        if self.running is not None:
            if self.running.poll() is None:
                return True
            self._book("failed" if self.running.returncode else "done")
        if self.failed or not self.jobs:
            return False
        if self.jobs[0].waits(self.place):
            return True
        command = self.jobs[0].command(self.place)
        with self._log().open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            self.began = time.monotonic()
            self.running = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        return True

    def stop(self) -> None:
        """Stop what still runs."""
        if self.running is not None and self.running.poll() is None:
            self.running.kill()
            self.running.wait()
            self._book("stopped")

    def _book(self, outcome: str) -> None:
        job = self.jobs[0]
        self.records.book(self._key(job), self.stage, job.command(self.place), outcome, time.monotonic() - self.began)
        click.echo(f"{self.stage}: {outcome}: {self._log()}")
        if outcome == "failed":
            click.echo("\n".join(self._log().read_text().splitlines()[-12:]))
        self.failed, self.running = outcome == "failed", None
        if outcome == "done":
            self.jobs.pop(0)


@click.group()
def main() -> None:
    pass


main.add_command(pack)
main.add_command(unpack)


@main.command()
@click.argument("stages", nargs=-1)
@click.option("--data-dir", default="data", show_default=True)
@click.option("--device", default=None, help="[default: cuda; of a dry run, cpu]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/gpu"), show_default=True)
@click.option("--minutes", default=9.5, show_default=True, help="After which what still runs is stopped, to go on later.")
@click.option("--dry", is_flag=True, help="On digits, in seconds.")
def run(stages: tuple[str, ...], data_dir: str, device: str | None, out: Path, minutes: float, dry: bool) -> None:
    """Run stages, one after another: all that no CPU has reached, where none is named."""
    if unknown := [stage for stage in stages if stage not in ALL]:
        raise click.BadParameter(f"{unknown[0]!r}: choose from {', '.join(ALL)}", param_hint="STAGES")
    place = Place(out, data_dir, device or ("cpu" if dry else "cuda"), dry)
    for folder in (place.models, out / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    records, began, left = Records(place), time.monotonic(), []
    for stage in stages or STAGES:
        chains = [Chain(stage, jobs, place, records) for jobs in ALL[stage]]
        while time.monotonic() - began < 60 * minutes and sum(chain.turn() for chain in chains):
            if all(chain.running is None for chain in chains):
                break  # they wait for models of stages that have not been run
            time.sleep(0.5)
        for chain in chains:
            chain.stop()
        left += [stage] if any(chain.jobs for chain in chains) else []
    click.echo(f"to be done: {', '.join(left)}" if left else "all done")


if __name__ == "__main__":
    main()
