"""Describe what to evaluate, and all that decides the result, by its hashes."""

from __future__ import annotations

import json
import logging
import tomllib
from dataclasses import asdict, dataclass, fields
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from ensemble_attacks.data import load_dataset
from ensemble_attacks.errors import unknown_name
from ensemble_attacks.evaluation.identity import code_version, made_of, versions
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.runner import check_arguments
from ensemble_attacks.evaluation.settings import Settings, Shared
from ensemble_attacks.evaluation.units import canonical
from ensemble_attacks.files import digest
from ensemble_attacks.models import providers
from ensemble_attacks.models.votes import check_vote
from ensemble_attacks.schema import MOST_IMAGES, StoredManifest, check
from ensemble_attacks.validation import check_count, check_positive, check_seed

logger = logging.getLogger(__name__)
PIECE = 500  # images that are read at once
DEFAULT_VOTES = ("softmax",)


@dataclass(frozen=True)
class Sweep(Shared):
    """A record of what to evaluate: every model with every vote, eps and seed.

    Attributes:
        models, votes, attacks: names.
        eps: the radii, in pixel units of [0, 1].
        dataset: the name of the dataset.
        seeds: the seeds.
        n: the number of test images, in file order; ``None``: all.
        shard_size: the number of images of every task.
        cascade: whether an image that an attack has fooled is not attacked by the next.
        others: the attributes of `ensemble_attacks.evaluation.settings.Shared`.
    """

    models: tuple[str, ...]
    eps: tuple[float, ...]
    attacks: tuple[str, ...]
    votes: tuple[str, ...] = DEFAULT_VOTES
    dataset: str = "digits"
    seeds: tuple[int, ...] = (0,)
    n: int | None = None
    shard_size: int = 250
    cascade: bool = False

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """Read a sweep from a TOML file with these names as keys; a list may be a single value.

        Raises:
            FileNotFoundError: Where there is no such file.
            ValueError: Where it is not TOML, or a key is unknown (the message names the nearest one), missing, or of another
                type.
        """
        try:
            given = tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not TOML: {error}") from error
        return cls.of(given, str(path))

    @classmethod
    def of(cls, given: dict[str, Any], where: str) -> Sweep:
        """Return the sweep of names and values, checked as in `read`; ``where`` is what errors call their source."""
        known = {field.name: field for field in fields(cls)}
        for key in given:
            if key not in known:
                raise unknown_name(f"key in {where}", key, known)
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
        return cls(**values)


def manifest_of(sweep: Sweep, *, model_dir: str | None, data_dir: str, download: bool = False) -> dict[str, Any]:
    """Return what decides a run's results, resolved: weights, images and code by their hashes.

    Everything is checked that can be.

    Raises:
        ValueError, TypeError, FileNotFoundError: Where something cannot be run.
    """
    check_count("shard_size", sweep.shard_size, at_most=MOST_IMAGES)
    n = len(load_dataset(sweep.dataset, data_dir=data_dir, n=sweep.n, download=download)[1])
    x, y = load_dataset(sweep.dataset, data_dir=data_dir, n=min(n, PIECE))
    weights, made = {}, {}
    for eps in sweep.eps:
        check_positive("eps", eps)
    for seed in sweep.seeds:
        check_seed(seed)
    for vote in sweep.votes:
        check_vote(vote)
    for name in sweep.models:
        model = providers.load_model(name, model_dir, sweep.dataset, vote=sweep.votes[0])
        if sweep.votes != DEFAULT_VOTES and getattr(model, "vote", None) != sweep.votes[0]:
            raise ValueError(f"vote {sweep.votes[0]!r}: {name} has no votes to choose from: leave it out for this model")
        shared = {known.name: getattr(sweep, known.name) for known in fields(Shared)}
        made[name] = made_of(model)
        check_arguments(model, x, y, sweep.attacks, Settings(sweep.eps[0], sweep.seeds[0], **shared))
        weights[name] = digest(*model.state_dict().values())
    manifest = {
        "sweep": asdict(sweep) | {"n": n, "shard_size": min(sweep.shard_size, n)},
        "weights": weights,
        "made": made,
        "data": data_digest(sweep.dataset, data_dir, n),
        "versions": versions(),
        "code": code_version(),
        "places": {
            "model_dir": None if model_dir is None else str(Path(model_dir).resolve()),
            "data_dir": str(Path(data_dir).resolve()),
        },
    }
    try:
        check(json.loads(json.dumps(manifest)), StoredManifest)  # what is written must be what is read
    except ValueError as error:
        raise ValueError(f"this cannot be run: {error}") from None
    return manifest


@cache
def data_digest(dataset: str, data_dir: str, n: int) -> str:
    """Return the hash of the first ``n`` images and their labels, read piece by piece."""
    parts = [(first, min(PIECE, n - first)) for first in range(0, n, PIECE)]
    hashes = [digest(*load_dataset(dataset, data_dir=data_dir, first=first, n=count)) for first, count in parts]
    return sha256("".join(hashes).encode()).hexdigest()


def warn_of_code(ledger: Ledger) -> None:
    """Log a warning where a run began with other code than this, which may judge it all the same."""
    if (code := ledger.manifest["code"]) != code_version():
        logger.warning(
            "the run began with code %s, this is %s: what is computed now may differ from it", code, code_version()
        )


def run_identity(manifest: dict[str, Any]) -> str:
    """Return a short name for a run: its hash, apart from where things lie."""
    return sha256(canonical(manifest | {"places": None})).hexdigest()[:10]
