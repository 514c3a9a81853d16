"""Say where a run's models and data come from: the source of a user's functions and classes, and the places of files.

Of every model that no installed package names, a manifest holds the sha256 of the source files (`sources.sources_of`) and
classes, and the versions of what they import; it is refused where they have changed. Names stay as they were given, and
``places`` says what they stand for by now.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks import data, sources
from ensemble_attacks.data.records import known_datasets
from ensemble_attacks.errors import LedgerError
from ensemble_attacks.evaluation.identity import source_of
from ensemble_attacks.evaluation.ledger import difference
from ensemble_attacks.evaluation.units import threat_of
from ensemble_attacks.models import providers
from ensemble_attacks.models.ask import ask, check_dtype, device_of
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.names import absolute
from ensemble_attacks.norms import UNIT
from ensemble_attacks.validation import check_label_range

logger = logging.getLogger(__name__)
CODE = ("files", "classes")  # what must be the same to judge what was found; what a run goes on with, also the rest
Origin = dict[str, dict[str, str]]


def origin_of(name: str, model: nn.Module) -> Origin:
    """Return by what source a model can be told from another; empty for one that an installed package names."""
    functions = providers.functions_in(name)
    if not functions and name not in providers.OFFERED:
        return {}
    files: dict[str, str] = {}
    for index, function in enumerate(functions):
        for path, digest in sources.sources_of(function).items():
            files[path if files.get(path, digest) == digest else f"{path} ({index})"] = digest
    versions: dict[str, str] = {}
    for function in functions:
        versions |= sources.environment_of(function)
    return {"files": files, "classes": _classes(model), "environment": versions}


def _classes(model: nn.Module) -> dict[str, str]:
    """Return the sha256 of the source of every class in a model that is no installed package's, by its name."""
    installed = {"ensemble_attacks", *(module.__name__.split(".")[0] for module in providers.providers())}
    found: dict[str, str] = {}
    for kind in {type(module) for module in model.modules()}:
        if kind.__module__.split(".")[0] in installed:
            continue
        source = source_of(kind)  # empty where it is typed into an interpreter, or compiled
        if source and not sources.is_installed(Path(inspect.getfile(kind)).resolve()):
            found[kind.__qualname__] = source
    return dict(sorted(found.items()))


def check_origin(manifest: dict[str, Any], name: str, model: nn.Module, *, same_code: bool) -> None:
    """Raise a `LedgerError` where the source of a model is not that which the run began with; it says what differs.

    What only one of the two has, as a run of a Python program's module has no files, is not compared; without
    ``same_code``, nor is the environment.
    """
    stored = manifest.get("origins", {}).get(name)
    if not stored:
        return
    now = origin_of(placed(manifest, name), model)
    for kind, content in stored.items():
        if not content or not now.get(kind):
            continue
        if differing := difference(content, now[kind]):
            told = f"the {kind} of {name} are not those that the run began with: {differing}"
            if same_code or kind in CODE:
                raise LedgerError(f"{told}: restore them, or begin another run (--out)")
            logger.warning("%s", told)


# -- places


def paths_in(names: Iterable[str], dataset: str) -> dict[str, str]:
    """Return what the names of models and data that hold paths stand for, as absolute paths."""
    listed = set(providers.list_models())

    def is_model(name: str) -> bool:
        return name in listed or name in providers.OFFERED

    def is_dataset(name: str) -> bool:
        return name in known_datasets() or name in data.OFFERED

    found = {name: absolute(name, is_model) for name in names} | {dataset: absolute(dataset, is_dataset)}
    return {name: place for name, place in found.items() if place != name}


def placed(manifest: dict[str, Any], name: str) -> str:
    """Return what a name of a model or of data stands for by now.

    Raises:
        LedgerError: Where it was something of a Python program, which is no more.
    """
    place = manifest["places"].get("paths", {}).get(name, name)
    if place in manifest["places"].get("given", ()) and place not in providers.OFFERED and place not in data.OFFERED:
        raise LedgerError(
            f"{name!r} was given by the Python program that began the run: say where it is to be had, as --model "
            "nets.py:make --data images.npz, or verify(folder, model=..., data=...)"
        )
    return place


def placed_anew(manifest: dict[str, Any], model: str | None, dataset: str | None) -> dict[str, Any]:
    """Return a manifest whose model and data are to be found elsewhere by now.

    Raises:
        ValueError: Where the run has several models.
    """
    sweep, places = manifest["sweep"], manifest["places"]
    paths = dict(places.get("paths", {}))
    if model is not None:
        if len(sweep["models"]) > 1:
            raise ValueError(f"model {model!r}: the run has {len(sweep['models'])} models, put them where they were")
        paths[sweep["models"][0]] = paths_in([model], sweep["dataset"]).get(model, model)
    if dataset is not None:
        paths[sweep["dataset"]] = paths_in([], dataset).get(dataset, dataset)
    return manifest | {"places": places | {"paths": paths}}


def images_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by which `load_dataset` loads the images of a run."""
    sweep, places, box = manifest["sweep"], manifest["places"], threat_of(manifest).box
    return {
        "name": placed(manifest, sweep["dataset"]),
        "data_dir": places["data_dir"],
        "transform": sweep.get("transform", ""),
        "rows": manifest.get("rows"),
        **({} if box == UNIT else {"span": box.span}),
    }


@contextmanager
def given(model: tuple[str, nn.Module] | None, images: tuple[str, data.Opened] | None) -> Iterator[None]:
    """Let a run find the model and data of a Python program, by these names, within the context."""
    models, opened = providers.OFFERED.copy(), data.OFFERED.copy()
    providers.OFFERED.update([model] if model else [])
    data.OFFERED.update([images] if images else [])
    try:
        yield
    finally:
        for now, before in ((providers.OFFERED, models), (data.OFFERED, opened)):
            now.clear()
            now.update(before)  # type: ignore[arg-type]


# -- fit


def check_fit(called: str, model: nn.Module, x: Tensor, labels: Tensor, dataset: str, classes: int | None) -> None:
    """Raise, before any work, where a model does not take images ``x`` (N, C, H, W), or has other classes than the data.

    Raises:
        ValueError: Where it raises on them, scores other classes than ``classes``, or lacks one of the labels.
        TypeError: Where it computes in another type.
    """
    few = x[:2].to(device_of(model, x.device))
    with guarded(model), torch.no_grad():
        check_dtype(model, few, "x")
        try:
            scored = ask(model, few).shape[1]
        except (RuntimeError, AssertionError, IndexError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"model {called!r} does not take the {tuple(x.shape[1:])} images of {dataset}: {reason}"
            ) from error
    check_label_range(labels, scored, "y")
    if classes is not None and scored != classes:
        raise ValueError(
            f"{dataset} has {classes} classes, but the model scores {scored} classes ({called}): name the data that it was "
            "trained for (--data)"
        )
