"""Define what a run is made of: cells (model, vote, eps, seed), and units, one attack on one range of images of a cell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from itertools import product
from math import prod
from typing import Any

from ensemble_attacks.evaluation.settings import Shared
from ensemble_attacks.threat import PLAIN, Threat

CLEAN = "clean"  # the unit that judges the clean images


def seed_said(seed: int) -> str:
    """Return what titles end in, such as ``, seed 1``; nothing for the seed 0."""
    return f", seed {seed}" if seed else ""


def radius_said(cell: dict[str, Any]) -> str:
    """Return norm and radius of a cell, and in what units, such as ``Linf 0.1 in [-1, 1]``."""
    within = f" {cell['within']}" if cell.get("within") else ""
    return f"{cell['norm']} {cell['eps']:g}{within}"


def canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


TOLD = ("within", "threat", "tune")  # of a cell, where there is something to be told


@dataclass(frozen=True)
class Cell(Shared):
    """A cell of a run: one model under one vote, eps and seed, and all else that decides its results.

    Attributes:
        eps: the radius of the ball, in the inputs' own units; of a radius for each feature, the largest.
        seed: the seed of all attacks, and of the models' randomness while they run.
        model, vote, dataset: names.
        n: the number of images of the run.
        cascade: whether an image that an attack has fooled is not attacked by the next.
        weights, data, code: hashes of the model, the images and the package.
        made: a hash of what the model is made of beside its weights: its modules, their options and their code.
        origin: a hash of the source that a user's own model comes from; empty where an installed package names it.
        transform: what is done to every image.
        within, threat: what titles say of where inputs may go, and the hash of it (`Threat`); empty where they live in
            [0, 1], all of them may move, and eps is a number.
    """

    eps: float
    seed: int = 0
    model: str = field(kw_only=True)
    vote: str = field(kw_only=True)
    dataset: str = field(kw_only=True)
    n: int = field(kw_only=True)
    cascade: bool = field(kw_only=True)
    weights: str = field(kw_only=True)
    data: str = field(kw_only=True)
    code: str = field(kw_only=True)
    made: str = field(default="", kw_only=True)
    origin: str = field(default="", kw_only=True)
    transform: str = field(default="", kw_only=True)
    within: str = field(default="", kw_only=True)
    threat: str = field(default="", kw_only=True)

    @property
    def listed(self) -> dict[str, Any]:
        """Return its content, as JSON has it; of `TOLD`, what there is to be told."""
        return {key: value for key, value in asdict(self).items() if value or key not in TOLD}

    @property
    def title(self) -> str:
        """Return a title for people."""
        return f"{self.model}, {self.vote}, {radius_said(vars(self))}{seed_said(self.seed)}"

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
        cell = {key: value for key, value in self.cell.listed.items() if key != "within"}  # the threat's hash says it
        return {**cell, "attack": self.attack, "before": list(self.before), "range": list(self.range)}

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


def _dimensions(manifest: dict[str, Any]) -> list[list[Any]]:
    """Return the lists whose product the cells of a run are."""
    return [manifest["sweep"][key] for key in ("models", "votes", "eps", "seeds")]


def _cell(manifest: dict[str, Any], model: str, vote: str, eps: float, seed: int) -> Cell:
    sweep = manifest["sweep"]
    shared = {key: sweep[key] for key in ("dataset", "transform", "norm", "n", "batch_size", "draws", "eot_iter", "amp")}
    shared["tune"] = sweep.get("tune", False)
    hashes = {key: manifest[key] for key in ("data", "code")} | {key: manifest[key][model] for key in ("weights", "made")}
    origin = manifest["origins"].get(model)
    hashes["origin"] = sha256(canonical(origin)).hexdigest() if origin else ""
    if threat := manifest.get("threat"):
        hashes |= {"threat": threat["sha256"], "within": threat_of(manifest).said(eps)}
    return Cell(eps=eps, seed=seed, model=model, vote=vote, cascade=sweep["cascade"], **shared, **hashes)


THREATS: dict[str, Threat] = {}  # the last one, by its hash, as it may take megabytes to read


def threat_of(manifest: dict[str, Any]) -> Threat:
    """Return where the inputs of a run may go."""
    stored = manifest.get("threat")
    if stored is None:
        return PLAIN
    if stored["sha256"] not in THREATS:
        THREATS.clear()
        THREATS[stored["sha256"]] = Threat.restored(stored)
    return THREATS[stored["sha256"]]


def cells_of(manifest: dict[str, Any]) -> list[Cell]:
    """Return the cells of a run: what its units have in common."""
    return [_cell(manifest, *choice) for choice in product(*_dimensions(manifest))]


def shards_of(manifest: dict[str, Any]) -> int:
    """Return the number of chains of every cell."""
    return -(-manifest["sweep"]["n"] // manifest["sweep"]["shard_size"])


def count_chains(manifest: dict[str, Any]) -> int:
    """Return the number of chains of a run."""
    return prod(map(len, _dimensions(manifest))) * shards_of(manifest)


def chain_of(manifest: dict[str, Any], index: int) -> list[Unit]:
    """Return the units of one chain, without those of the others: the clean images first, then the attacks in order."""
    if not 0 <= index < count_chains(manifest):
        raise IndexError(f"chain {index} of {count_chains(manifest)}")
    sweep, (number, shard) = manifest["sweep"], divmod(index, shards_of(manifest))
    choice: list[Any] = []
    for values in reversed(_dimensions(manifest)):
        number, at = divmod(number, len(values))
        choice.insert(0, values[at])
    cell, start = _cell(manifest, *choice), shard * sweep["shard_size"]
    images = (start, min(start + sweep["shard_size"], sweep["n"]))
    names = [CLEAN, *sweep["attacks"]]
    return [Unit(cell, name, tuple(names[:i]) if sweep["cascade"] else (), images) for i, name in enumerate(names)]


def chains_of(manifest: dict[str, Any]) -> list[list[Unit]]:
    """Return the units, by the task that runs them, in the order of `chain_of`."""
    return [chain_of(manifest, index) for index in range(count_chains(manifest))]


def by_cell(manifest: dict[str, Any]) -> Iterator[tuple[Cell, list[list[Unit]]]]:
    """Yield every cell with its chains."""
    shards = shards_of(manifest)
    for index in range(count_chains(manifest) // shards):
        chains = [chain_of(manifest, index * shards + shard) for shard in range(shards)]
        yield chains[0][0].cell, chains
