"""What a run is made of: cells (model, vote, eps, seed), and units, one attack on one range of images of a cell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

CLEAN = "clean"  # the unit that judges the clean images


@dataclass(frozen=True)
class Unit:
    """A piece of work.

    Attributes:
        identity: the hash of ``content``.
        content: all that decides the result.
    """

    content: dict[str, Any]

    @property
    def identity(self) -> str:
        return hashlib.sha256(canonical(self.content)).hexdigest()[:32]

    @property
    def name(self) -> str:
        """For people."""
        content = self.content
        seed = f" seed {content['seed']}" if content["seed"] else ""
        return "{model} {vote} {eps:g}{} {attack} {range[0]}-{range[1]}".format(seed, **content)


def canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def cells_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of a run: what its units have in common."""
    sweep = manifest["sweep"]
    return [
        {
            "model": model,
            "vote": vote,
            "eps": eps,
            "seed": seed,
            **{key: sweep[key] for key in ("dataset", "norm", "n", "batch_size", "draws", "eot_iter", "amp", "cascade")},
            "weights": manifest["weights"][model],
            "data": manifest["data"],
            "code": manifest["code"],
        }
        for model, vote, eps, seed in product(sweep["models"], sweep["votes"], sweep["eps"], sweep["seeds"])
    ]


def seed_said(content: dict[str, Any]) -> str:
    """What titles of cells and units end in: ``, seed 1``; nothing of the seed 0."""
    return f", seed {content['seed']}" if content["seed"] else ""


def chains_of(manifest: dict[str, Any]) -> list[list[Unit]]:
    """The units, by the task that runs them: the clean images first, then the attacks in order."""
    sweep = manifest["sweep"]
    names = [CLEAN, *sweep["attacks"]]
    starts = range(0, sweep["n"], sweep["shard_size"])
    chains = []
    for cell, start in product(cells_of(manifest), starts):
        span = [start, min(start + sweep["shard_size"], sweep["n"])]
        before = [names[:index] if sweep["cascade"] else [] for index in range(len(names))]
        chains.append(
            [Unit({**cell, "attack": name, "before": b, "range": span}) for name, b in zip(names, before, strict=True)]
        )
    return chains


def _by_cell(manifest: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[list[Unit]]]]:
    chains, cells = chains_of(manifest), cells_of(manifest)
    shards = len(chains) // len(cells)
    for index, cell in enumerate(cells):
        yield cell, chains[index * shards : (index + 1) * shards]
