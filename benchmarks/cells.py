"""The cells of a benchmark, each attack on each shard of the test images in a folder of its own, kept.

A shard that has been run is not run again, so a benchmark goes on where it stopped, and several processes can take different
cells.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.options import file_name, named
from benchmarks.records import as_flags, save
from defenses import load_model, model_card
from ensemble_attacks.data import load_dataset
from ensemble_attacks.evaluation.identity import code_version
from ensemble_attacks.evaluation.runner import Attacked, evaluate
from ensemble_attacks.evaluation.suite import Settings
from ensemble_attacks.files import write_whole

SHARD = 250
TRACE = "trace.csv"  # of an attack, step by step
TRACED = ("stage", "step", "fooled", "forwards", "backwards")  # its columns


@dataclass(frozen=True)
class Cell:
    """A model, its vote, and the Linf radius in pixel units of [0, 1]."""

    model: str
    vote: str
    eps: float

    @property
    def name(self) -> str:
        return f"{self.model}:{self.vote}:{self.eps:g}"


@dataclass(frozen=True)
class Run:
    """What all cells of a benchmark share."""

    out: Path
    n: int
    seed: int
    data_dir: str
    model_dir: str | None = None
    dataset: str = "cifar10"
    shard: int = SHARD
    draws: int = 1
    eot_iter: int | None = None
    device: str = "cpu"

    def shards(self) -> range:
        if self.n < 1 or self.n % self.shard:
            raise click.BadParameter(f"{self.n} is not a multiple of {self.shard}", param_hint="--n")
        return range(self.n // self.shard)

    def folder(self, cell: Cell, shard: int, attack: str) -> Path:
        return self.out / f"{cell.model}_{cell.vote}_{cell.eps:g}_seed{self.seed}" / file_name(f"{shard}_{attack}")

    def attack(self, cells: Iterable[Cell], attacks: Iterable[str]) -> None:
        """Run what has not been run."""
        missing, others = [], 0
        for shard, cell, attack in product(self.shards(), list(cells), list(attacks)):
            where = self.folder(cell, shard, attack)
            if not (where / "summary.json").exists():
                missing.append((shard, cell, attack, where))
            else:
                others += self._checked(where, cell, shard).get("code") != code_version()
        if others:
            click.echo(f"{others} of the stored shards were run with other code: remove them to run them again", err=True)
        if not missing:
            return
        images, labels = load_dataset(self.dataset, data_dir=self.data_dir, n=self.n)
        torch.backends.cudnn.allow_tf32 = False  # verdicts are those of float32
        for shard, cell, attack, where in missing:
            if (where / "summary.json").exists():  # another process was quicker
                continue
            part = slice(shard * self.shard, (shard + 1) * self.shard)
            model = load_model(cell.model, self.model_dir, self.dataset, vote=cell.vote).to(self.device)
            settings = Settings(cell.eps, seed=self.seed, batch_size=SHARD, draws=self.draws, eot_iter=self.eot_iter)
            about = {"model": cell.model, "vote": cell.vote, "dataset": self.dataset, "first": shard * self.shard}
            about["weights"] = self._weights(cell)
            run_attack(where, model, images[part], labels[part], attack, settings, about, told=f"{cell.name} {shard}")

    def _weights(self, cell: Cell) -> str:
        return model_card(cell.model, self.model_dir, self.dataset)["sha256"]

    def _checked(self, where: Path, cell: Cell, shard: int) -> dict[str, Any]:
        """A stored summary; `click.UsageError` for one of another run."""
        own = {"weights": self._weights(cell), "n": self.shard, "first": shard * self.shard}
        return stored(where, **own, draws=self.draws, eot_iter=self.eot_iter)

    def finished(self, cell: Cell, attacks: Iterable[str]) -> list[dict[str, Path]]:
        """Of the shards that all ``attacks`` have run, the folder of each attack."""
        shards = {shard: {attack: self.folder(cell, shard, attack) for attack in attacks} for shard in self.shards()}
        done = {n: folders for n, folders in shards.items() if all((f / "summary.json").exists() for f in folders.values())}
        for shard, folders in done.items():
            for where in folders.values():
                self._checked(where, cell, shard)
        return list(done.values())


def run_attack(
    folder: Path,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: str,
    settings: Settings,
    about: dict[str, Any],
    *,
    told: str,
) -> None:
    """Evaluate an attack, and store in a folder what it found, as ``summary.json``; ``about`` says of what it is."""
    left: list[Attacked] = []
    keep, report = partial(_keep, left), partial(_tell, told)
    found = evaluate(model, images, labels, [attack], settings, keep=keep, report=report)
    record(folder, about | {"code": code_version()} | found, left[0])


def record(folder: Path, found: dict[str, Any], left: Attacked) -> None:
    """Store what an attack found in a folder: ``summary.json``, with each image's flag, last, and the trace that it kept."""
    folder.mkdir(parents=True, exist_ok=True)
    if left.trace and left.trace[0]["stage"] < 0:  # those that were seen (`Watch.rows`) are long
        lines = [",".join(TRACED), *(",".join(str(at[column]) for column in TRACED) for at in left.trace)]
        write_whole(folder / TRACE, "\n".join([*lines, ""]).encode())
    save(folder / "summary.json", found | {"seconds": round(left.seconds, 1), "flags": as_flags(left.judgement.robust)})


def _keep(left: list[Attacked], name: str, attacked: Attacked) -> None:
    left.append(attacked)


def _tell(at: str, name: str, row: dict[str, Any]) -> None:
    click.echo(f"{at} {name}: {100 * row['accuracy']:.1f}", err=True)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def stored(folder: Path, **own: Any) -> dict[str, Any]:
    """Return a stored summary; `click.UsageError` where it is of other weights, images or settings than one's ``own``."""
    found = summary(folder)
    if other := next((key for key, value in own.items() if found.get(key, value) != value), None):
        raise click.UsageError(f"{folder} was run with another {other} ({found[other]}): choose another --out")
    return found


def choose(names: str | None, known: Iterable[Cell]) -> list[Cell]:
    """The cells of these comma-separated names; all, if there are none."""
    by_name = {cell.name: cell for cell in known}
    return [by_name[name] for name in named(names, by_name, "--cells")] if names else list(by_name.values())


def run_options(out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command-line options of a `Run`."""
    options = [
        click.option("--data-dir", default="data", show_default=True),
        click.option("--model-dir", help="Where models are looked for, before those that ship."),
        click.option("--out", type=click.Path(path_type=Path), default=Path(out), show_default=True),
        click.option("--n", default=500, show_default=True, help=f"Test images, in shards of {SHARD}."),
        click.option("--seed", default=0, show_default=True),
        click.option("--cells", help="Comma-separated model:vote:eps.  [default: all]"),
        click.option("--device", default="cpu", show_default=True),
        click.option("--table-only", is_flag=True, help="Run nothing, print what is there."),
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
