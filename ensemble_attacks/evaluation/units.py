"""Define what a run is made of: cells (model, vote, eps, seed), and units, one attack on one range of images of a cell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from hashlib import sha256
from itertools import product
from typing import Any

from ensemble_attacks.evaluation.settings import Settings

CLEAN = "clean"  # the unit that judges the clean images


def seed_said(seed: int) -> str:
    """Return what titles end in, such as ``, seed 1``; nothing for the seed 0."""
    return f", seed {seed}" if seed else ""


def canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True)
class Cell(Settings):
    """A cell of a run: one model under one vote, eps and seed, and all else that decides its results.

    Attributes:
        model, vote, dataset: names.
        n: the number of images of the run.
        cascade: whether an image that an attack has fooled is not attacked by the next.
        weights, data, code: hashes of the model, the images and the package.
    """

    model: str = field(kw_only=True)
    vote: str = field(kw_only=True)
    dataset: str = field(kw_only=True)
    n: int = field(kw_only=True)
    cascade: bool = field(kw_only=True)
    weights: str = field(kw_only=True)
    data: str = field(kw_only=True)
    code: str = field(kw_only=True)

    @property
    def settings(self) -> Settings:
        """Return what its attacks share."""
        return Settings(**{known.name: getattr(self, known.name) for known in fields(Settings)})

    @property
    def title(self) -> str:
        """Return a title for people."""
        return f"{self.model}, {self.vote}, {self.norm} {self.eps:g}{seed_said(self.seed)}"

    @property
    def key(self) -> str:
        """Return what tells the cells of a run apart."""
        return f"{self.model} {self.vote} {self.eps} {self.seed}"


@dataclass(frozen=True)
class Unit:
    """A piece of work: one attack on one range of the images of a cell.

    Attributes:
        cell: the cell.
        attack: the name of the attack; `CLEAN` judges the clean images.
        before: with ``cascade``, the attacks whose results it depends on.
        range: the first image, and the one behind the last.
    """

    cell: Cell
    attack: str
    before: tuple[str, ...]
    range: tuple[int, int]

    @classmethod
    def of(cls, content: dict[str, Any]) -> Unit:
        """Return the unit that has this `content`."""
        own = {key: content[key] for key in ("attack", "before", "range")}
        cell = Cell(**{key: value for key, value in content.items() if key not in own})
        return cls(cell, own["attack"], tuple(own["before"]), (own["range"][0], own["range"][1]))

    @cached_property
    def content(self) -> dict[str, Any]:
        """Return all that decides the result, as JSON has it."""
        return {**asdict(self.cell), "attack": self.attack, "before": list(self.before), "range": list(self.range)}

    @cached_property
    def identity(self) -> str:
        """Return the hash of `content`."""
        return sha256(canonical(self.content)).hexdigest()[:32]

    @property
    def name(self) -> str:
        """Return a name for people."""
        cell, (start, stop) = self.cell, self.range
        seed = f" seed {cell.seed}" if cell.seed else ""
        return f"{cell.model} {cell.vote} {cell.eps:g}{seed} {self.attack} {start}-{stop}"


def cells_of(manifest: dict[str, Any]) -> list[Cell]:
    """Return the cells of a run: what its units have in common."""
    sweep = manifest["sweep"]
    shared = {key: sweep[key] for key in ("dataset", "norm", "n", "batch_size", "draws", "eot_iter", "amp", "cascade")}
    hashes = {key: manifest[key] for key in ("data", "code")}
    return [
        Cell(eps, seed, model=model, vote=vote, weights=manifest["weights"][model], **shared, **hashes)
        for model, vote, eps, seed in product(sweep["models"], sweep["votes"], sweep["eps"], sweep["seeds"])
    ]


def chains_of(manifest: dict[str, Any]) -> list[list[Unit]]:
    """Return the units, by the task that runs them: the clean images first, then the attacks in order."""
    sweep = manifest["sweep"]
    names = [CLEAN, *sweep["attacks"]]
    before = [tuple(names[:index]) if sweep["cascade"] else () for index in range(len(names))]
    starts = range(0, sweep["n"], sweep["shard_size"])
    return [
        [
            Unit(cell, name, b, (start, min(start + sweep["shard_size"], sweep["n"])))
            for name, b in zip(names, before, strict=True)
        ]
        for cell, start in product(cells_of(manifest), starts)
    ]


def by_cell(manifest: dict[str, Any]) -> Iterator[tuple[Cell, list[list[Unit]]]]:
    """Yield every cell with its chains."""
    chains, cells = chains_of(manifest), cells_of(manifest)
    shards = len(chains) // len(cells)
    for index, cell in enumerate(cells):
        yield cell, chains[index * shards : (index + 1) * shards]
