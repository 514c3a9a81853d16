"""Describe what to evaluate, and all that decides the result, by its hashes."""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ensemble_attacks.data import OFFERED, Opened, load_dataset, numbers_of, open_dataset, state_of
from ensemble_attacks.evaluation.identity import code_version, made_of, versions
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.origins import check_fit, images_of, origin_of, paths_in
from ensemble_attacks.evaluation.runner import check_arguments, check_settings
from ensemble_attacks.evaluation.selection import PIECE, chosen, rows_said
from ensemble_attacks.evaluation.settings import DEFAULT_VOTES, Sweep
from ensemble_attacks.evaluation.units import canonical
from ensemble_attacks.files import digest
from ensemble_attacks.models import providers
from ensemble_attacks.models.ask import device_of
from ensemble_attacks.models.votes import OWN, check_vote
from ensemble_attacks.schema import MOST_IMAGES, MOST_JSON, StoredManifest, check
from ensemble_attacks.validation import check_count, check_per_feature, check_positive, check_seed

logger = logging.getLogger(__name__)


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
    for eps in sweep.eps:
        check_positive("eps", eps)
    for seed in sweep.seeds:
        check_seed(seed)
    for vote in sweep.votes:
        if vote != OWN:
            check_vote(vote)
    dataset = dataset_of(sweep, model_dir)
    given: dict[str, Any] = {"data_dir": data_dir, "transform": sweep.transform, "span": sweep.threat.box.span}
    opened = open_dataset(dataset, download=download, **given)
    two = max(1, min(2, len(opened) - sweep.first))
    few = opened.take(numbers_of(opened, range(len(opened)), two, sweep.first))[0]
    check_within(few, sweep)
    models = {name: providers.load_model(name, model_dir, dataset, vote=sweep.votes[0]) for name in sweep.models}
    for name, model in models.items():
        if sweep.votes not in (DEFAULT_VOTES, (OWN,)) and getattr(model, "vote", None) != sweep.votes[0]:
            raise ValueError(f"vote {sweep.votes[0]!r}: {name} has no votes to choose from: leave it out for this model")
        check_fit(name, model, few, opened.labels, dataset, opened.classes)
    return Subjects(models, dataset, opened, chosen(sweep, opened, list(models.values())))


def check_within(x: Tensor, sweep: Sweep) -> None:
    """Raise a `ValueError` where a box, a mask, or eps for each feature is not for inputs of the shape of ``x`` (N, ...)."""
    threat = sweep.threat
    named = {"box": (threat.box.low, threat.box.high), "movable": (threat.mask,), "eps": tuple(threat.radii.values())}
    for name, values in named.items():
        for value in values:
            check_per_feature(name, value, x)


def manifest_of(sweep: Sweep, *, model_dir: str | None, data_dir: str, download: bool = False) -> dict[str, Any]:
    """Return what decides a run's results, resolved: weights, images and code by their hashes.

    Everything is checked that can be.

    Raises:
        ValueError, TypeError, FileNotFoundError: Where something cannot be run.
    """
    check_count("shard_size", sweep.shard_size, at_most=MOST_IMAGES)
    subjects = subjects_of(sweep, model_dir=model_dir, data_dir=data_dir, download=download)
    models, dataset, numbers = subjects.models, subjects.dataset, subjects.numbers
    votes, n = sweep.votes, len(numbers)
    if votes == DEFAULT_VOTES and len(models) == 1 and sweep.models[0] not in providers.list_models():
        votes = (vote_said(models[sweep.models[0]]),)
    manifest: dict[str, Any] = {
        "sweep": sweep.listed() | {"n": n, "shard_size": min(sweep.shard_size, n), "dataset": dataset, "votes": votes},
        "rows": rows_said(numbers),
        "images": len(subjects.opened),
        "versions": versions(),
        "code": code_version(),
        "places": {
            "model_dir": None if model_dir is None else str(Path(model_dir).resolve()),
            "data_dir": str(Path(data_dir).resolve()),
            "paths": paths_in(sweep.models, dataset),
            "given": sorted({*providers.OFFERED, *OFFERED} & {*sweep.models, dataset}),
        },
    }
    if not sweep.threat.plain:
        manifest["threat"] = sweep.threat.stored()
    images = images_of(manifest)
    x, y = load_dataset(**images, n=min(n, PIECE))
    settings = [sweep.settings(eps, seed, sweep.threat) for eps, seed in product(sweep.eps, sweep.seeds)]
    for model in models.values():
        check_arguments(model, x, y, sweep.attacks, settings[0])
        for others in settings[1:]:
            check_settings(model, x, sweep.attacks, others)
    manifest |= {
        "weights": {name: digest(*model.state_dict().values()) for name, model in models.items()},
        "made": {name: made_of(model, x[:2].to(device_of(model, x.device))) for name, model in models.items()},
        "origins": {name: origin for name, model in models.items() if (origin := origin_of(name, model))},
        "data": data_digest(images, n),
    }
    _check_readable(manifest)
    return manifest


def _check_readable(manifest: dict[str, Any]) -> None:
    """Raise a `ValueError` where a manifest, once it is written, could not be read."""
    data = json.dumps(manifest)
    try:
        check(json.loads(data), StoredManifest)
        if 2 * len(data) > MOST_JSON:  # as it is written, each number has a line of its own
            raise ValueError(f"its manifest takes {len(data):,} bytes: take fewer images")
    except ValueError as error:
        raise ValueError(f"this cannot be run: {error}") from None


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


def data_digest(images: dict[str, Any], n: int) -> str:
    """Return the hash of a run's first ``n`` images (`images_of`) and their labels, read piece by piece."""
    return _data_digest(canonical(images), n, state_of(images["name"]))


@lru_cache(maxsize=8)
def _data_digest(images: bytes, n: int, state: Hashable) -> str:
    parts = [(first, min(PIECE, n - first)) for first in range(0, n, PIECE)]
    hashes = [digest(*load_dataset(**json.loads(images), first=first, n=count)) for first, count in parts]
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
