"""What a GPU is needed for: correctness and speed there, and trainings that take a CPU days.

    python benchmarks/gpu.py pack parts/ --data-dir DIR      # CIFAR-10 in parts small enough to carry
    python benchmarks/gpu.py unpack parts/*.tar --data-dir DIR
    python benchmarks/gpu.py run check speed eight mixed --data-dir DIR --out runs/gpu --minutes 9

A stage is a few chains of jobs; the chains run side by side, as one small network leaves most of a GPU idle, the jobs of a
chain one after another. Every job resumes from what lies in ``--out``, so that a run that was cut off goes on with the same
command. ``--toy`` runs the same stages on digits on a CPU, in seconds.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import pickle
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

FILES = [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]
META = "batches.meta"
WIDE = 10  # images side by side in a packed picture
PIECE = 1000  # images of a packed picture
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Place:
    """Where jobs run; ``toy``: in seconds, on digits."""

    models: Path
    data_dir: str
    device: str
    toy: bool


@dataclass(frozen=True)
class Training:
    """One call of `defenses.train_model`, when ``start_from``, one of those before it, is there."""

    recipe: str
    minutes: float
    members: int = 8
    network: str = "resnet20"
    start_from: tuple[str, str, int] | None = None  # recipe, network, members
    max_lr: float | None = None

    def name(self, recipe: str, network: str, members: int, place: Place) -> str:
        return f"{recipe}_{'convnet' if place.toy else network}_{members}"

    def waits(self, place: Place) -> bool:
        return self.start_from is not None and not any(place.models.rglob(f"{self.name(*self.start_from, place)}.json"))

    def command(self, place: Place) -> list[str]:
        own = self.name(self.recipe, self.network, self.members, place)
        options: dict[str, Any] = {
            "dataset": "digits" if place.toy else "cifar10",
            "architecture": "convnet" if place.toy else self.network,
            "members": self.members,
            "minutes": self.minutes / 300 if place.toy else self.minutes,
            "amp": not place.toy,
            "start_from": None if self.start_from is None else self.name(*self.start_from, place),
            "max_lr": self.max_lr,
            "data_dir": place.data_dir,
            "device": place.device,
            "model_dir": str(place.models),
            "out": str(place.models / own),
        }
        call = f"from defenses import train_model; print(train_model({self.recipe!r}, **{options!r}))"
        return [sys.executable, "-c", call]


@dataclass(frozen=True)
class Script:
    """One benchmark: its file, arguments, those of the toy, and whether it reads images."""

    file: str
    arguments: str
    toy_arguments: str
    reads: bool = True

    def waits(self, place: Place) -> bool:
        return False

    def command(self, place: Place) -> list[str]:
        arguments = (self.toy_arguments if place.toy else self.arguments).format(models=place.models).split()
        where = ["--device", place.device, "--out", str(place.models.parent / Path(self.file).stem)]
        where += ["--data-dir", place.data_dir] if self.reads else []
        return [sys.executable, str(HERE / self.file), *arguments, *where]


TOY_MASKS = (
    "--backbone standard_convnet_3 --dataset digits --depth 4 --width 8 --rates 1e-4 --checkpoints 2 --n 4 --pgd-steps 1"
)
TOY_CELLS = "--n 250 --attacks pgd --table-only"
MIXED = "--backbone standard_mixed_3"
TOY_SPEED = "--models resnet20*2 --n 2 --steps 1 --repetitions 1"
EIGHT, THREE = ("standard", "resnet20", 8), ("standard", "mixed", 3)
STAGES: dict[str, list[list[Training | Script]]] = {
    "check": [
        [Script("devices.py", "", "--models gal_convnet_3 --attacks mora --n 10")],
    ],
    "speed": [
        [
            Script("speed.py", "--n 250", TOY_SPEED, reads=False),
            Script("speed.py", "--models wrn28x10*1 --n 250 --steps 5 --repetitions 3", TOY_SPEED, reads=False),
        ]
    ],
    "eight": [
        [Training("standard", 2.2), Training("gal", 6, start_from=EIGHT, max_lr=2e-3)],
        [Training("adp", 5)],
        [Training("trs", 6, start_from=EIGHT, max_lr=2e-3)],
        [Training("dverge", 6.9, start_from=EIGHT, max_lr=0.05)],
        [Training("dverge_at", 12.5, start_from=EIGHT, max_lr=0.05)],
    ],
    "mixed": [
        [
            Training("standard", 2.5, 3, "mixed", max_lr=0.1),
            Training("each_at", 12, 3, "mixed", start_from=THREE, max_lr=0.1),
        ],
    ],
    "masks": [
        [Script("masks.py", "--rates 1e-5,3e-5,3e-6,1e-4 --amp", TOY_MASKS)],
        [Script("masks.py", "--rates 3e-5,1e-5 --no-norm --amp", f"{TOY_MASKS} --no-norm")],
        [Script("masks.py", "--rates 3e-5,1e-5 --temperature 0.2 --amp", f"{TOY_MASKS} --temperature 0.2")],
    ],
    "mixed_masks": [
        [Script("masks.py", f"{MIXED} --member {index} --rates 1e-5,3e-5 --amp --model-dir {{models}}", TOY_MASKS)]
        for index in range(3)
    ],
    "everywhere": [
        [Training("multiresolution", 9, 3, "resnet18", max_lr=5e-4)],
    ],
    "everywhere_at": [
        [Training("multiresolution_at", 6, 1, "resnet18", max_lr=5e-4)],
    ],
    "cells": [
        [Script("table1.py", f"--n 250 --attacks autoattack --model-dir {{models}} --cells {cells}", TOY_CELLS)]
        for cells in (
            "standard_resnet20_8:voting:0.01,standard_resnet20_8:softmax:0.01,adp_resnet20_8:softmax:0.01",
            "gal_resnet20_8:softmax:0.01,gal_resnet20_8:voting:0.01",
            "trs_resnet20_8:voting:0.01,trs_resnet20_8:softmax:0.01",
            "dverge_resnet20_8:voting:0.01,dverge_resnet20_8:softmax:0.01",
        )
    ],
}


@click.group()
def main() -> None:
    pass


def _squeezed(pixels: np.ndarray) -> bytes:
    """Images (N, 3072), as one lossless picture."""
    from PIL import Image

    tiles = pixels.reshape(-1, WIDE, 3, 32, 32).transpose(0, 3, 1, 4, 2)
    file = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(tiles.reshape(len(tiles) * 32, WIDE * 32, 3)))
    picture.save(file, "webp", lossless=True, quality=80, method=4, exact=True)
    return file.getvalue()


def _unsqueezed(content: bytes) -> np.ndarray:
    from PIL import Image

    picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    tiles = picture.reshape(-1, 32, WIDE, 32, 3).transpose(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3072)


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data-dir", type=click.Path(path_type=Path), required=True)
@click.option("--parts", default=3, show_default=True)
def pack(out: Path, data_dir: Path, parts: int) -> None:
    """CIFAR-10's official files as lossless pictures, about half as large, in tar files from which `unpack` makes them
    again, byte for byte.
    """
    out.mkdir(parents=True, exist_ok=True)
    for index in range(parts):
        with tarfile.open(out / f"{index}.tar", "w") as tar:

            def add(name: str, content: bytes, tar: tarfile.TarFile = tar) -> None:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

            for name in FILES[index::parts]:
                raw = (data_dir / "cifar-10-batches-py" / name).read_bytes()
                images = pickle.loads(raw, encoding="bytes")[b"data"]  # noqa: S301 - the official file, checked by unpack
                at = raw.index(images.tobytes())
                add(f"{name}.md5", hashlib.md5(raw).hexdigest().encode())
                add(f"{name}.head", lzma.compress(raw[:at]))
                add(f"{name}.tail", lzma.compress(raw[at + images.nbytes :]))
                for piece in range(len(images) // PIECE):
                    add(f"{name}.{piece}.webp", _squeezed(images[piece * PIECE : (piece + 1) * PIECE]))
            if not index:
                add(META, (data_dir / "cifar-10-batches-py" / META).read_bytes())


@main.command()
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data-dir", type=click.Path(path_type=Path), required=True)
def unpack(parts: tuple[Path, ...], data_dir: Path) -> None:
    """Make the official files of what `pack` made."""
    out = data_dir / "cifar-10-batches-py"
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        with tarfile.open(part) as tar:
            held = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in FILES:
            if f"{name}.md5" not in held:
                continue
            pieces = [held[f"{name}.{piece}.webp"] for piece in range(10_000 // PIECE)]
            pixels = b"".join(_unsqueezed(piece).tobytes() for piece in pieces)
            raw = lzma.decompress(held[f"{name}.head"]) + pixels + lzma.decompress(held[f"{name}.tail"])
            if hashlib.md5(raw).hexdigest().encode() != held[f"{name}.md5"]:
                raise click.ClickException(f"{name} of {part} is damaged: pack it again")
            (out / name).write_bytes(raw)
        if META in held:
            (out / META).write_bytes(held[META])


class Chain:
    """Jobs one after another."""

    def __init__(self, jobs: list[Training | Script], place: Place, logs: Path) -> None:
        self.jobs, self.place, self.logs = list(jobs), place, logs
        self.running: subprocess.Popen[bytes] | None = None
        self.log, self.failed = logs, False

    def turn(self) -> bool:
        """Start what is next; is there anything left to wait for?"""
        if self.running is not None and self.running.poll() is None:
            return True
        self.failed = self.running is not None and self.running.returncode != 0
        if self.failed or not self.jobs:
            return False
        if self.jobs[0].waits(self.place):
            return True
        command = self.jobs.pop(0).command(self.place)
        self.log = self.logs / f"{hashlib.md5(' '.join(command).encode()).hexdigest()[:8]}.log"
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            self.running = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        return True

    def stop(self) -> None:
        if self.running is not None and self.running.poll() is None:
            self.running.kill()
            self.running.wait()
            click.echo(f"{self.log.stem}: stopped, goes on with the same command")
        elif self.failed:
            click.echo(f"{self.log.stem} failed:\n" + "\n".join(self.log.read_text().splitlines()[-12:]))


@main.command()
@click.argument("stages", nargs=-1, required=True)
@click.option("--data-dir", default="data", show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/gpu"), show_default=True)
@click.option("--minutes", default=9.5, show_default=True, help="After which what still runs is stopped, to go on later.")
@click.option("--toy", is_flag=True, help="On digits, in seconds.")
def run(stages: tuple[str, ...], data_dir: str, device: str, out: Path, minutes: float, toy: bool) -> None:
    """Run stages, side by side."""
    place = Place(out / "models", data_dir, device, toy)
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    place.models.mkdir(exist_ok=True)
    began = time.monotonic()
    chains = [Chain(jobs, place, logs) for stage in stages for jobs in STAGES[stage]]
    while sum(chain.turn() for chain in chains) and time.monotonic() - began < 60 * minutes:
        time.sleep(0.5)
    for chain in chains:
        chain.stop()


if __name__ == "__main__":
    main()
