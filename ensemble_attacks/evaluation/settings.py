"""Define the settings of an evaluation, and of a sweep of several."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ensemble_attacks.errors import unknown_name
from ensemble_attacks.norms import UNIT, Box
from ensemble_attacks.schema import read_toml
from ensemble_attacks.threat import PLAIN, Threat


@dataclass(frozen=True)
class Shared:
    """A record of what all cells of a run share.

    Attributes:
        norm: the norm of the ball.
        batch_size: the number of images per pass.
        draws: the number of fresh forward passes by which the judge decides on each image of a random model.
        eot_iter: the number of draws of every iterate of a random model; ``None``: the model is deterministic.
        amp: whether to craft in mixed precision where it is faster (`twin_for`); the judge does not.
        tune: whether to craft by recorded or compiled passes where they are faster (`quickest`); the judge does not.
    """

    norm: str = field(default="Linf", kw_only=True)
    batch_size: int = field(default=250, kw_only=True)
    draws: int = field(default=1, kw_only=True)
    eot_iter: int | None = field(default=None, kw_only=True)
    amp: bool = field(default=False, kw_only=True)
    tune: bool = field(default=False, kw_only=True)

    def settings(self, eps: float, seed: int, threat: Threat) -> Settings:
        """Return what the attacks of one evaluation share, eps being the number that stands for the radius (`Threat`)."""
        shared = {of.name: getattr(self, of.name) for of in fields(Shared)}
        return Settings(threat.eps(eps), seed, box=threat.box, mask=threat.mask, **shared)


@dataclass(frozen=True)
class Settings(Shared):
    """A record of what all attacks of one evaluation share.

    Attributes:
        eps: the radius of the ball, in the inputs' own units, or that of each feature.
        seed: the seed of all attacks, and of the models' randomness while they run.
        box: the values that inputs can take.
        mask: what may move, bool, of every input (...); ``None``: all.
    """

    eps: float | Tensor
    seed: int = 0
    box: Box = field(default=UNIT, kw_only=True)
    mask: Tensor | None = field(default=None, kw_only=True)

    @property
    def plain(self) -> bool:
        """Tell whether inputs live in [0, 1], all of them may move, and eps is a number."""
        return self.box == UNIT and self.mask is None and not isinstance(self.eps, Tensor)

    def listed(self) -> dict[str, Any]:
        """Return the settings as JSON can hold them."""
        listed = {of.name: getattr(self, of.name) for of in fields(self) if of.name not in ("box", "mask")}
        if self.plain:
            return listed
        threat, (eps,) = Threat.of(self.box, self.mask, [self.eps])
        return listed | {"eps": eps, "threat": threat.said(eps)}


DEFAULT_VOTES = ("softmax",)


@dataclass(frozen=True)
class Sweep(Shared):
    """A record of what to evaluate: every model with every vote, eps and seed.

    Attributes:
        models, votes, attacks: names.
        eps: the radii, in the inputs' own units; of a radius for each feature, the largest.
        dataset: the name of the dataset, or a file, folder or function, as `open_dataset` takes it; ``None``: what the names
            of the models imply.
        seeds: the seeds.
        n: the number of test images, in file order; ``None``: all.
        shard_size: the number of images of every task.
        cascade: whether an image that an attack has fooled is not attacked by the next.
        first: the number of the first image, counted from 0.
        sample: the number of images that are drawn, of every class in its share, by the first of the seeds; ``None``: the
            first ``n``.
        only_correct: whether images that one of the models gets wrong are passed by.
        transform: what is done to every image, such as ``"resize=256,crop=224"``.
        threat: the box that inputs live in, what of them may move, and the radii that are for each feature; asked for as
            ``box``, ``movable`` and ``eps`` (`Threat.of`).
        others: the attributes of `ensemble_attacks.evaluation.settings.Shared`.
    """

    models: tuple[str, ...]
    eps: tuple[float, ...]
    attacks: tuple[str, ...]
    votes: tuple[str, ...] = DEFAULT_VOTES
    dataset: str | None = None
    seeds: tuple[int, ...] = (0,)
    n: int | None = None
    shard_size: int = 250
    cascade: bool = False
    first: int = 0
    sample: int | None = None
    only_correct: bool = False
    transform: str = ""
    threat: Threat = PLAIN

    def listed(self) -> dict[str, Any]:
        """Return all but the threat, as JSON can hold it; ``tune`` where it is asked for."""
        named = (of.name for of in fields(self) if of.name != "threat" and (self.tune or of.name != "tune"))
        return {name: getattr(self, name) for name in named}

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """Read a sweep from a TOML file with these names as keys; a list may be a single value.

        Raises:
            FileNotFoundError: Where there is no such file.
            ValueError: Where it is not TOML, or a key is unknown (the message names the nearest one), missing, or of another
                type.
        """
        return cls.of(read_toml(path), str(path))

    @classmethod
    def of(cls, given: dict[str, Any], where: str) -> Sweep:
        """Return the sweep of names and values, checked as in `read`; ``where`` is what errors call their source.

        Beside a sweep's attributes, ``box`` and ``movable`` are keys, whose values, and those of ``eps``, are what
        `Threat.of` takes.
        """
        known = {field.name: field for field in fields(cls) if field.name != "threat"}
        for key in given:
            if key not in known and key not in WHERE:
                raise unknown_name(f"key in {where}", key, [*known, *WHERE])
        given, threat = _with_radii({key: _plain(value) for key, value in given.items()})
        needed = {"models", "eps", "attacks", *(key for key in given if str(known[key].type).startswith("tuple"))}
        if missing := [key for key in known if key in needed and given.get(key) in (None, [], (), "")]:
            raise ValueError(f"{where} does not say its {missing[0]}")
        values = {}
        for key, value in given.items():
            kind = str(known[key].type)
            if kind.startswith("tuple"):
                value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            wanted: dict[str, tuple[type, ...]] = {"str": (str,), "float": (float, int), "int": (int,), "bool": (bool,)}
            inner = next(name for name in wanted if name in kind)
            for one in value if isinstance(value, tuple) else (value,):
                fits = isinstance(one, wanted[inner]) and (inner == "bool" or not isinstance(one, bool))
                if not fits and not (one is None and "None" in kind):
                    raise ValueError(f"{where}: {key} holds {one!r}, which is no {inner}")
            if isinstance(value, tuple) and len(set(value)) < len(value):
                raise ValueError(f"{where}: {key} holds {next(v for v in value if value.count(v) > 1)!r} twice")
            values[key] = value
        return cls(**values, threat=threat)


WHERE = ("box", "movable")  # what a threat is asked for by, beside eps


def _with_radii(given: dict[str, Any]) -> tuple[dict[str, Any], Threat]:
    """Return the names and values of a sweep, eps as numbers and without `WHERE`, and the threat that these make."""
    rest = {key: value for key, value in given.items() if key not in WHERE}
    eps = rest.get("eps")
    several = list(eps) if isinstance(eps, (list, tuple)) else [eps]
    if eps is None or (isinstance(eps, str) and not eps):
        several = []
    threat, numbers = Threat.of(given.get("box"), given.get("movable"), several)
    return rest | ({"eps": numbers} if numbers else {}), threat


def _plain(value: Any) -> Any:
    """Return numpy's numbers as Python's."""
    return value.item() if isinstance(value, np.generic) else value
