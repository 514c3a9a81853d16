"""Make models of ours of weights that others published.

Read are torch checkpoints of CIFAR ResNets (He et al. 2016) in the layouts of DVERGE's repository (members under
``model_0``, ``model_1``, ..., each a network and its normaliser), of akamaster's (``state_dict``, ``module.`` prefixes),
plain state dicts, and those of a whole ensemble (``members.0.``, ...); shortcuts with or without a projection. Pickled code
is never run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defenses.architectures import ARCHITECTURES, NORMALIZATIONS
from defenses.gal import slope_of
from defenses.zoo.cards import check_name, make_ensemble, write_model
from ensemble_attacks.data import DATASETS
from ensemble_attacks.errors import WeightsError, unknown_name
from ensemble_attacks.files import load_tensors
from ensemble_attacks.models.ensembles import Ensemble

State = dict[str, Tensor]
Normalization = tuple[list[float], list[float]]
DEEPEST = 8  # levels of lists and dicts that are looked into
FIRST = re.compile(r"(?:^|.*\.)(?=conv_?1\.weight$)")
RENAMED = ((r"stage_(\d)", r"layer\1"), (r"(conv|bn)_(\d)", r"\1\2"), (r"\bdownsample\b", "shortcut"), (r"\bfc\b", "linear"))


def read_checkpoint(path: str | Path) -> list[State]:
    """Return the state dict of every member in a checkpoint.

    Raises:
        FileNotFoundError: Where there is no such file.
        WeightsError: Where it is no checkpoint that can be read without running what it pickles, or holds no members.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {str(path)!r}: name the downloaded file")
    try:
        content = load_tensors(path)
    except ValueError as error:
        raise WeightsError(
            f"checkpoint {str(path)!r} cannot be read as plain weights: {error}. Save the members' state dicts alone, with "
            "the code that made it"
        ) from None
    members = _members(content, str(path))
    if not members:
        raise WeightsError(
            f"checkpoint {str(path)!r} holds no CIFAR ResNet: expected a state dict with a first 'conv1.weight', or one for "
            "each member"
        )
    return members


def _members(content: Any, path: str, depth: int = 0) -> list[State]:
    """Descend through lists and dicts to the state dicts of networks, and return these.

    Optimisers and the like are passed by. Networks side by side are members if their keys differ in a number alone:
    ``best_state_dict`` or ``ema`` hold a copy.
    """
    if depth > DEEPEST or not isinstance(content, dict | list | tuple):
        return []
    if not isinstance(content, dict):
        return [state for part in content for state in _members(part, path, depth + 1)]
    if any(FIRST.match(str(key)) for key in content):
        return _split({str(key): value for key, value in content.items() if isinstance(value, Tensor)})
    found = {str(key): _members(content[key], path, depth + 1) for key in sorted(content, key=_natural)}
    holding = [key for key, states in found.items() if states]
    if len(holding) > 1 and (len({re.sub(r"\d+", "#", key) for key in holding}) > 1 or not re.search(r"\d", holding[0])):
        raise WeightsError(
            f"checkpoint {path!r} holds networks called {', '.join(holding)}: save the one that is meant alone"
        )
    return [state for key in holding for state in found[key]]


def _prefixes(state: State) -> list[str]:
    """Return what stands before the first convolution of each network in a state dict."""
    firsts = [match.group() for key in state if (match := FIRST.match(key)) and "layer" not in key and "stage" not in key]
    return sorted(firsts, key=_natural)


def _split(state: State) -> list[State]:
    """Return the state dicts of the networks in that of an ensemble.

    Their prefixes differ in one part, ``members.0.``; what stands beside them, such as a normaliser, is everybody's.
    """
    prefixes = [prefix.split(".") for prefix in _prefixes(state)]
    if len(prefixes) < 2:
        return [state]
    at = next((i for i, parts in enumerate(zip(*prefixes, strict=False)) if len(set(parts)) > 1), 0)
    roots = [".".join(parts[: at + 1]) + "." for parts in prefixes]
    shared = {key: value for key, value in state.items() if not key.startswith(tuple(roots))}
    return [{key: value for key, value in state.items() if key.startswith(root)} | shared for root in roots]


def _natural(key: object) -> list[tuple[int, str]]:
    """Return a key to sort by, so that ``model_10`` comes after ``model_9``."""
    return [(int(part or 0), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(key))]


def translate(state: State) -> tuple[State, Normalization | None]:
    """Return a member's state dict with our names, and the normalisation stored beside the network, if any.

    Raises:
        WeightsError: Where it is not that of a CIFAR ResNet, or its values cannot be used.
    """
    prefixes = _prefixes(state)
    if len(prefixes) != 1:
        raise WeightsError(
            f"no CIFAR ResNet: its keys begin with {', '.join(list(state)[:3])}, not with a first 'conv1.weight'"
        )
    network: State = {}
    rest: State = {}
    for key, value in state.items():
        (network if key.startswith(prefixes[0]) else rest)[key.removeprefix(prefixes[0])] = value
    for pattern, name in RENAMED:
        network = {re.sub(pattern, name, key): value for key, value in network.items()}
    rest |= {key: network.pop(key) for key in list(network) if key.split(".")[-1] in ("mean", "std")}
    found = {key.split(".")[-1]: value.flatten().tolist() for key, value in rest.items()}
    unknown = set(found) - {"mean", "std"}
    if unknown:
        raise WeightsError(f"no CIFAR ResNet: {', '.join(sorted(rest))} do not belong to one")
    if len(found) == 1:
        raise WeightsError(f"there is a {', '.join(found)}, but not the other of mean and std: store both, or none")
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise WeightsError("the weights are not finite: this is what a training that diverged leaves")
    if found and not all(deviation > 0 for deviation in found["std"]):
        raise WeightsError(f"the normalisation's std is {found['std']}: expected numbers above 0")
    return network, (found["mean"], found["std"]) if found else None


def architecture_of(network: State) -> tuple[str, int]:
    """Return the name of the architecture, and the number of classes, of a translated state dict."""
    blocks = len({key.split(".")[1] for key in network if key.startswith("layer1.")})
    projection = "b" if any("shortcut" in key for key in network) else ""
    if "linear.weight" not in network:
        raise WeightsError("no CIFAR ResNet: it has no last layer 'linear' or 'fc'")
    return f"resnet{6 * blocks + 2}{projection}", len(network["linear.weight"])


def ensemble_from_checkpoint(
    paths: str | Path | Sequence[str | Path],
    *,
    dataset: str = "cifar10",
    normalization: str = "cifar10",
    negative_slope: float = 0.0,
    vote: str = "softmax",
) -> tuple[Ensemble, dict[str, Any]]:
    """Return the members of one or several checkpoints, as an ensemble, and what a card must say to build it again.

    Args:
        paths: one checkpoint, or several.
        dataset: the name of the dataset.
        normalization: what the members were trained with, ``"cifar10"``, ``"imagenet"`` or ``"none"``; where the checkpoint
            holds a normalisation of its own, it is that one.
        negative_slope: the slope of the members' leaky ReLU (GAL's have 0.1), which a checkpoint does not tell.
        vote: the ensemble's vote.

    Raises:
        ValueError: Where an argument cannot be used.
        FileNotFoundError, WeightsError: As `read_checkpoint` raises them; also where members differ in architecture or
            classes.
    """
    if normalization not in NORMALIZATIONS:
        raise unknown_name("normalization", normalization, NORMALIZATIONS)
    if not (math.isfinite(negative_slope) and negative_slope >= 0):
        raise ValueError(f"negative_slope is {negative_slope}: expected 0 (ReLU) or more")
    if dataset not in DATASETS:
        raise unknown_name("dataset", dataset, DATASETS)
    mean, std = NORMALIZATIONS[normalization]
    translated = [translate(state) for path in listed(paths) for state in read_checkpoint(path)]
    kinds = {architecture_of(network) for network, _ in translated}
    found = [own for _, own in translated if own is not None]
    channels = (DATASETS[dataset].shape or (3,))[0]
    if any(len(part) not in (1, channels) for own in found for part in own):
        raise WeightsError(f"the normalisation is {found[0]}: expected one number, or one for each of {channels} channels")
    if len(kinds) > 1 or any(own != found[0] for own in found):
        raise WeightsError(f"the members differ: {sorted(kinds)}: convert them one by one, then load 'ensemble:NAME+NAME'")
    architecture, num_classes = kinds.pop()
    if num_classes != DATASETS[dataset].classes:
        raise WeightsError(f"the checkpoint has {num_classes} classes, {dataset} has {DATASETS[dataset].classes}")
    options: dict[str, Any] = {"num_classes": num_classes, "normalization": found[0] if found else (list(mean), list(std))}
    if negative_slope:
        options["negative_slope"] = negative_slope
    ensemble = make_ensemble(architecture, len(translated), vote, **options)
    for member, (network, _) in zip(ensemble.members, translated, strict=True):
        try:
            member.load_state_dict(network)
        except RuntimeError as error:
            raise WeightsError(f"the checkpoint is not a {architecture}: {' '.join(str(error).split())}") from None
    return ensemble.eval(), {"architecture": architecture, "members": len(translated), **options}


def listed(paths: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """Return one path, or several, as a list; raise a `ValueError` for none."""
    several = [paths] if isinstance(paths, str | Path) else list(paths)
    if not several:
        raise ValueError("paths is empty: name at least one checkpoint")
    return several


def check_build(name: str, build: dict[str, Any]) -> None:
    """Raise a `WeightsError` where a name ``<defense>_<architecture>_<members>`` says other than what was found."""
    defense, *said = name.rsplit("_", 2)
    found = [build["architecture"], str(build["members"])]
    if len(said) == 2 and said[0] in ARCHITECTURES and found not in (said, [f"{said[0]}b", said[1]]):
        raise WeightsError(f"the checkpoint is not {name!r}: what it holds is {'_'.join([defense, *found])}")


def convert(
    paths: str | Path | Sequence[str | Path],
    name: str,
    *,
    model_dir: str | Path,
    dataset: str = "cifar10",
    normalization: str = "cifar10",
    negative_slope: float | None = None,
) -> Path:
    """Make a model of published checkpoints, for ``load_model(name, model_dir, dataset)``; return its card's path.

    Args:
        paths: one checkpoint, or several.
        name: the name of the model, which may say what is to be found (`check_build`).
        model_dir: the folder of the new model.
        negative_slope: the slope of the members' leaky ReLU; ``None``: 0.1 for a name that begins with gal, else 0.
        dataset, normalization: the arguments of `ensemble_from_checkpoint` of these names.

    Raises:
        FileExistsError: Where there is a model of this name already.
        ValueError, FileNotFoundError, WeightsError: As `ensemble_from_checkpoint` and `check_build` raise them.
    """
    check_name(name)
    stem = Path(model_dir) / dataset / "Linf" / name
    if stem.with_suffix(".json").exists():
        raise FileExistsError(f"model_dir already holds {str(stem)!r}: choose another name, or remove it")
    slope = slope_of(name) if negative_slope is None else negative_slope
    ensemble, build = ensemble_from_checkpoint(paths, dataset=dataset, normalization=normalization, negative_slope=slope)
    check_build(name, build)
    files = ", ".join(Path(path).name for path in listed(paths))
    card = {"defense": f"converted from {files}", "dataset": dataset, **build}
    return write_model(stem, ensemble, card, half=False)
