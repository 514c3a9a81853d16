"""Find models by name: in the packages that register a module under the entry-point group ``ensemble_attacks.models``, in a
user's own files and folders.

Such a module has ``list_models(dataset, model_dir) -> list[str]`` and
``load_model(name, model_dir, dataset, threat_model, *, vote)``; one that can train or convert also has ``train_model`` or
``convert``. It may have ``KINDS``, functions by the kind of a name (``timm`` of ``timm:resnet18``): (name, options,
*, model_dir, dataset, threat_model) -> model; ``COMBINATIONS``, functions by kind: (members, **options) -> ensemble;
``load_folder(path, vote) -> model``; and ``datasets_of(name) -> list[str]``, the datasets of models that it does not list.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ensemble_attacks import sources
from ensemble_attacks.data import DATASETS
from ensemble_attacks.errors import WeightsError, said, unknown_name
from ensemble_attacks.models.ask import ask
from ensemble_attacks.models.functions import model_of_function, suggested_dataset
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.names import KIND, options_in, outermost, split_options, unwrapped

GROUP = "ensemble_attacks.models"
OFFERED: dict[str, nn.Module] = {}  # the models of a Python program, by the names that its runs know them by


def providers() -> list[ModuleType]:
    """Import the registered modules, and return them.

    Raises:
        ImportError: Where a module of the same name, such as a folder in the working directory, was found in place of one.
    """
    return [_provider(entry) for entry in entry_points(group=GROUP)]


def _provider(entry: EntryPoint) -> ModuleType:
    try:
        module = entry.load()
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != entry.module.partition(".")[0]:
            raise
        module = importlib.import_module(entry.module.partition(".")[0])
    if not all(hasattr(module, name) for name in ("list_models", "load_model")):
        place = module.__file__ or next(iter(getattr(module, "__path__", [])), "?")
        owner = entry.dist.name if entry.dist else "an installed package"
        raise ImportError(
            f"{place} is imported as {entry.module!r}, which is the name of a package of {owner}: rename that file or "
            "folder, or run from another one"
        )
    return module


def able_to(function: str) -> ModuleType:
    """Return the first provider that has ``function``.

    Raises:
        ValueError: Where no installed provider has it.
    """
    able = next((provider for provider in providers() if hasattr(provider, function)), None)
    if able is None:
        raise ValueError(f"no installed package can {function}: install one that registers it under {GROUP!r}")
    return able


def list_models(dataset: str | None = None, model_dir: str | Path | None = None) -> list[str]:
    """Return the names that `load_model` knows, over all providers, of one dataset or of all."""
    return sorted({name for provider in providers() for name in provider.list_models(dataset, model_dir)})


def _all(attribute: str) -> dict[str, Any]:
    """Return the functions that providers have by kind; the first provider's, where several have one."""
    return {kind: make for one in reversed(providers()) for kind, make in getattr(one, attribute, {}).items()}


def load_model(
    name: str,
    model_dir: str | Path | None = None,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    *,
    vote: str = "softmax",
) -> nn.Module:
    """Load a model by its name, whoever made it.

    Args:
        name: a name that `list_models` returns; ``path/to/file.py:function`` or ``package.module:function``, with options as
            ``?key=value``, which returns a module, or a module and what is known of it (`models.functions`); a folder of
            weights; ``torchvision:NAME``, ``timm:NAME``, ``hf:FOLDER``, ``robustbench:NAME``; or several of these that
            decide together, ``ensemble:A+B+C?vote=voting``, ``crossmax:A+B+C``,
            ``randomized:A+B+C?probabilities=0.5,0.3,0.2``.
        model_dir: a folder of further models; ``None``: only those that the providers ship.
        dataset: the dataset whose images the model takes.
        threat_model: the norm that the model was trained against.
        vote: how the members of an ensemble are put together, a key of ``VOTES``; a name's own option comes first.

    Returns:
        The model: images (N, C, H, W) in [0, 1] -> scores (N, K).

    Raises:
        ValueError: Where nobody knows the model; the message names the nearest one.
        ValueError, FileNotFoundError, ImportError: As the provider, or a user's function, raises them.
        WeightsError: Where it cannot be loaded, whatever else a provider, a host's loader or a download raised.
    """
    if name in OFFERED:
        return OFFERED[name]
    for provider in providers():
        if dataset in DATASETS and name in provider.list_models(dataset, model_dir):
            load = partial(provider.load_model, name, model_dir, dataset, threat_model, vote=vote)
            return _loaded(name, model_dir, load)
    places = {"model_dir": model_dir, "dataset": dataset, "threat_model": threat_model}
    body, query = split_options(name)
    body = body.replace("/", ":", 1) if body.startswith("timm/") else body  # its older spelling
    match, kinds, combinations = KIND.fullmatch(body), _all("KINDS"), _all("COMBINATIONS")
    if match and match["kind"] in combinations:
        return _combined(name, combinations, vote, places)
    if match and match["kind"] in kinds:
        make = kinds[match["kind"]]
        model = _loaded(name, model_dir, lambda: make(match["body"], options_in(query), **places)).eval()
        _classes(name, model, dataset)
        return model
    if sources.is_function(name):
        return model_of_function(name)
    if Path(body).is_dir():
        return able_to("load_folder").load_folder(Path(body), vote)
    if homes := [known for known in DATASETS if dataset not in DATASETS and name in list_models(known, model_dir)]:
        raise ValueError(
            f"model {name!r} is one for {', '.join(homes)}, and the images are {dataset!r}: pass a function that loads it, "
            "as file.py:function"
        )
    told = unknown_name(f"model for {dataset}", name, list_models(dataset if dataset in DATASETS else None, model_dir))
    others = [*(f"{kind}:NAME" for kind in kinds), *(f"{kind}:A+B" for kind in combinations)]
    raise ValueError(f"{told}; or file.py:function, a folder, {', '.join(others)}")


def _loaded(name: str, model_dir: str | Path | None, load: Callable[[], nn.Module]) -> nn.Module:
    """Return what ``load`` returns; raise what it raises as a `WeightsError`, unless that says what is wrong already."""
    try:
        return load()
    except UnicodeError as error:  # a ValueError that names no file
        raise _not_loaded(name, model_dir, error) from error
    except (ValueError, FileNotFoundError, ImportError):
        raise
    except (Exception, SystemExit) as error:  # of a download, a damaged file, weights that do not fit, ...
        raise _not_loaded(name, model_dir, error) from error


def _not_loaded(name: str, model_dir: str | Path | None, error: BaseException) -> WeightsError:
    place = "" if model_dir is None else f" from model_dir {str(model_dir)!r}"
    return WeightsError(
        f"model {name!r} cannot be loaded{place} ({said(error)}): fetch its weights again, or name another model"
    )


def _combined(name: str, combinations: dict[str, Callable[..., Any]], vote: str, places: dict[str, Any]) -> nn.Module:
    """Load the members of a name such as ``ensemble:A+B+C?vote=voting``, and put them together.

    Raises:
        ValueError: Where there are fewer than two, one cannot be loaded, they differ in classes, or an option is unknown.
    """
    body, query = split_options(name)
    kind, _, rest = body.partition(":")
    parts = [unwrapped(part) for part in outermost(rest, "+")]
    if len(parts) < 2 or not all(parts):
        raise ValueError(
            f"{name!r}: name at least two models, as in '{kind}:nets.py:first+nets.py:second', and put one that has options "
            "into parentheses"
        )
    options = options_in(query)
    if kind == "ensemble" and options.get("vote") in combinations:
        kind = options.pop("vote")
    make = combinations[kind]
    takes = [key for key in inspect.signature(make).parameters if key != "members"]
    if unknown := next((key for key in options if key not in takes), None):
        raise unknown_name(f"option of {kind}:", unknown, takes)
    if "vote" in takes:
        options = {"vote": vote} | options
    members = [_member(part, **places) for part in parts]
    classes = {part: _classes(part, member, places["dataset"]) for part, member in zip(parts, members, strict=True)}
    if len({of for of in classes.values() if of}) > 1:
        raise ValueError(f"the members of an ensemble must have the same classes, but these have {classes}")
    return make(members, **options).eval()


def _member(part: str, *, model_dir: str | Path | None, dataset: str, threat_model: str) -> nn.Module:
    """Load a member: a name of `load_model`, or that of a model of RobustBench's zoo alone."""
    places = (model_dir, dataset, threat_model)
    plain = not any(mark in part for mark in ":/.") and not Path(part).exists() and part not in OFFERED
    if plain and dataset in DATASETS and part not in list_models(dataset, model_dir) and "robustbench" in _all("KINDS"):
        return load_model(f"robustbench:{part}", *places).eval()
    return load_model(part, *places).eval()


def _classes(name: str, net: nn.Module, dataset: str) -> int | None:
    """Return how many classes a network has; ``None`` where the shape of the dataset's images is not known beforehand.

    Raises:
        ValueError: Where it does not take the dataset's images.
    """
    shape = DATASETS[dataset].shape if dataset in DATASETS else None
    if shape is None:
        return None
    try:
        with guarded(net), torch.no_grad():
            return ask(net, torch.zeros(1, *shape)).shape[1]
    except Exception as error:  # anybody's network fails in its own way
        raise ValueError(f"model {name!r} does not take the {shape} images of {dataset}: {said(error)}") from None


def functions_in(name: str) -> list[str]:
    """Return the names of a user's functions in a model's name, such as the members of ``ensemble:nets.py:a+nets.py:b``."""
    body, _ = split_options(name)
    match = KIND.fullmatch(body)
    if match and match["kind"] in _all("COMBINATIONS"):
        return [one for part in outermost(match["body"], "+") for one in functions_in(unwrapped(part))]
    theirs = name in OFFERED or (match and match["kind"] in _all("KINDS"))
    return [name] if not theirs and sources.is_function(name) else []


def implied_dataset(name: str, model_dir: str | Path | None = None) -> str | None:
    """Return the dataset that a model's name implies; ``None`` where it is none or several."""
    body, _ = split_options(name)
    match = KIND.fullmatch(body)
    if match and match["kind"] in _all("COMBINATIONS"):
        found = {implied_dataset(unwrapped(part), model_dir) for part in outermost(match["body"], "+")} - {None}
        return found.pop() if len(found) == 1 else None
    listed = {dataset for dataset in DATASETS if name in list_models(dataset, model_dir)}
    listed |= {one for provider in providers() for one in getattr(provider, "datasets_of", lambda name: [])(name)}
    if not listed and functions_in(name):
        return suggested_dataset(name)
    return listed.pop() if len(listed) == 1 else None
