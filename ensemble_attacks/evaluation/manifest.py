"""Describe what to evaluate, and all that decides the result, by its hashes."""

from __future__ import annotations

import json
import logging
import tomllib
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torchattacks
from torch import nn

from ensemble_attacks.data import OFFERED, Opened, load_dataset, numbers_of, open_dataset, state_of
from ensemble_attacks.data.choice import stratified
from ensemble_attacks.errors import unknown_name
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.origins import check_fit, images_of, origin_of, paths_in
from ensemble_attacks.evaluation.runner import check_arguments, judged
from ensemble_attacks.evaluation.settings import Settings, Shared
from ensemble_attacks.evaluation.units import canonical
from ensemble_attacks.files import digest
from ensemble_attacks.hosts.autoattack import Original
from ensemble_attacks.models import providers
from ensemble_attacks.models.votes import OWN, check_vote
from ensemble_attacks.validation import check_count
from ensemble_attacks.version import __version__

logger = logging.getLogger(__name__)
PIECE = 500  # images that are read at once
DEFAULT_VOTES = ("softmax",)


@dataclass(frozen=True)
class Sweep(Shared):
    """A record of what to evaluate: every model with every vote, eps and seed.

    Attributes:
        models, votes, attacks: names.
        eps: the radii, in pixel units of [0, 1].
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


@dataclass(frozen=True, eq=False)
class Subjects:
    """A record of what a sweep is of: the models by name, the dataset's name, its images, and the numbers of those taken."""

    models: dict[str, nn.Module]
    dataset: str
    opened: Opened
    numbers: Sequence[int]


def subjects_of(sweep: Sweep, *, model_dir: str | None, data_dir: str, download: bool = False) -> Subjects:
    """Load what a sweep names, and choose its images.

    Raises:
        ValueError, TypeError, FileNotFoundError: Where something is not there, or does not fit.
    """
    for vote in sweep.votes:
        if vote != OWN:
            check_vote(vote)
    dataset = dataset_of(sweep, model_dir)
    opened = open_dataset(dataset, data_dir=data_dir, download=download, transform=sweep.transform)
    two = max(1, min(2, len(opened) - sweep.first))
    few = load_dataset(dataset, data_dir=data_dir, transform=sweep.transform, first=sweep.first, n=two)[0]
    models = {name: providers.load_model(name, model_dir, dataset, vote=sweep.votes[0]) for name in sweep.models}
    for name, model in models.items():
        if sweep.votes not in (DEFAULT_VOTES, (OWN,)) and getattr(model, "vote", None) != sweep.votes[0]:
            raise ValueError(f"vote {sweep.votes[0]!r}: {name} has no votes to choose from: leave it out for this model")
        check_fit(name, model, few, opened.labels, dataset, opened.classes)
    return Subjects(models, dataset, opened, chosen(sweep, opened, list(models.values())))


def manifest_of(sweep: Sweep, *, model_dir: str | None, data_dir: str, download: bool = False) -> dict[str, Any]:
    """Return what decides a run's results, resolved: weights, images and code by their hashes.

    Everything is checked that can be.

    Raises:
        ValueError, TypeError, FileNotFoundError: Where something cannot be run.
    """
    check_count("shard_size", sweep.shard_size)
    subjects = subjects_of(sweep, model_dir=model_dir, data_dir=data_dir, download=download)
    models, dataset, numbers = subjects.models, subjects.dataset, subjects.numbers
    votes, n = sweep.votes, len(numbers)
    if votes == DEFAULT_VOTES and len(models) == 1 and sweep.models[0] not in providers.list_models():
        votes = (vote_said(models[sweep.models[0]]),)
    manifest: dict[str, Any] = {
        "sweep": asdict(sweep) | {"n": n, "dataset": dataset, "votes": votes},
        "rows": None if isinstance(numbers, range) and numbers.start == 0 else list(numbers),
        "images": len(subjects.opened),
        "code": code_version(),
        "places": {
            "model_dir": None if model_dir is None else str(Path(model_dir).resolve()),
            "data_dir": str(Path(data_dir).resolve()),
            "paths": paths_in(sweep.models, dataset),
            "given": sorted({*providers.OFFERED, *OFFERED} & {*sweep.models, dataset}),
        },
    }
    images = images_of(manifest)
    x, y = load_dataset(**images, n=min(n, PIECE))
    for model in models.values():
        shared = {known.name: getattr(sweep, known.name) for known in fields(Shared)}
        for eps, seed in product(sweep.eps, sweep.seeds):
            check_arguments(model, x, y, sweep.attacks, Settings(eps, seed, **shared))
    return manifest | {
        "weights": {name: digest(*model.state_dict().values()) for name, model in models.items()},
        "origins": {name: origin for name, model in models.items() if (origin := origin_of(name, model))},
        "data": data_digest(images, n),
    }


def dataset_of(sweep: Sweep, model_dir: str | None) -> str:
    """Return the dataset of a sweep: the one named, or the one that the names of its models imply.

    Raises:
        ValueError: Where none is named, and the models imply none, or several.
    """
    if sweep.dataset is not None:
        return sweep.dataset
    implied = {name: providers.implied_dataset(name, model_dir) for name in sweep.models}
    found = set(implied.values())
    if len(found) == 1 and (dataset := found.pop()) is not None:
        return dataset
    told = ", ".join(f"{name}: {dataset or 'none'}" for name, dataset in implied.items())
    raise ValueError(f"the models' names imply no one dataset ({told}): name it, as --data cifar10 or --data images.npz")


def vote_said(model: nn.Module) -> str:
    """Return what a model that nobody gave a vote says of its own."""
    vote = getattr(model, "vote", None)
    return vote if isinstance(vote, str) else OWN


def chosen(sweep: Sweep, opened: Opened, models: Sequence[nn.Module]) -> Sequence[int]:
    """Return the numbers of the images that a sweep takes of a dataset.

    Raises:
        ValueError: Where there are fewer than it asks for.
    """
    if sweep.sample is not None and sweep.n is not None:
        raise ValueError(f"n is {sweep.n} and sample {sweep.sample}: name one of them")
    numbers = numbers_of(opened, range(len(opened)), None, sweep.first)
    if sweep.only_correct:
        numbers = _right(sweep, opened, models, numbers)
    if sweep.sample is None:
        return numbers_of(opened, numbers, sweep.n)
    return [numbers[index] for index in stratified(opened.labels[list(numbers)], sweep.sample, sweep.seeds[0])]


def _right(sweep: Sweep, opened: Opened, models: Sequence[nn.Module], numbers: Sequence[int]) -> list[int]:
    """Return the numbers of images that all models get right, as the judge finds; no more than are needed."""
    shared = {known.name: getattr(sweep, known.name) for known in fields(Shared)}
    settings = Settings(sweep.eps[0], sweep.seeds[0], **shared)
    found: list[int] = []
    for start in range(0, len(numbers), PIECE):
        piece = numbers[start : start + PIECE]
        x, y = opened.take(piece)
        right = torch.stack([judged(model, x, y, x, settings).robust for model in models]).all(0)
        found += [number for number, keep in zip(piece, right.tolist(), strict=True) if keep]
        if sweep.sample is None and sweep.n is not None and len(found) >= sweep.n:
            break
    return found


def data_digest(images: dict[str, Any], n: int) -> str:
    """Return the hash of a run's first ``n`` images (`images_of`) and their labels, read piece by piece."""
    return _data_digest(canonical(images), n, state_of(images["name"]))


@lru_cache(maxsize=8)
def _data_digest(images: bytes, n: int, state: Hashable) -> str:
    parts = [(first, min(PIECE, n - first)) for first in range(0, n, PIECE)]
    hashes = [digest(*load_dataset(**json.loads(images), first=first, n=count)) for first, count in parts]
    return sha256("".join(hashes).encode()).hexdigest()


@cache
def code_version() -> str:
    """Return this package's version, and a hash of its sources, the models' sources, and the versions they stand on."""
    modules = [provider.__file__ for provider in providers.providers() if provider.__file__]
    folders = [Path(__file__).parents[1], *(Path(file).parent for file in modules)]
    state = sha256(f"{torch.__version__} {Original.__module__} {torchattacks.__version__}".encode())
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            state.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return f"{__version__}+{state.hexdigest()[:12]}"


def warn_of_code(ledger: Ledger) -> None:
    """Log a warning where a run began with other code than this, which may judge it all the same."""
    if (code := ledger.manifest["code"]) != code_version():
        logger.warning(
            "the run began with code %s, this is %s: what is computed now may differ from it", code, code_version()
        )


def run_identity(manifest: dict[str, Any]) -> str:
    """Return a short name for a run: its hash, apart from where things lie."""
    return sha256(canonical(manifest | {"places": None})).hexdigest()[:10]
