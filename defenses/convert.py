"""Weights that others published, as models of ours.

Read are torch checkpoints of CIFAR ResNets (He et al. 2016) in the layouts of DVERGE's repository (members under
``model_0``, ``model_1``, ..., each a network and its normaliser), of akamaster's (``state_dict``, ``module.`` prefixes), and
plain state dicts; shortcuts with or without a projection. Pickled code is never run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from defenses.architectures import NORMALIZATIONS
from defenses.cards import make_ensemble, write_model
from ensemble_attacks.checkpoints import load_tensors
from ensemble_attacks.data import DATASETS, NUM_CLASSES
from ensemble_attacks.ensembles import Ensemble
from ensemble_attacks.errors import WeightsError, unknown_name

State = dict[str, Tensor]
Normalization = tuple[list[float], list[float]]
FIRST = re.compile(r"(?:^|.*\.)(?=conv_?1\.weight$)")
RENAMED = ((r"stage_(\d)", r"layer\1"), (r"(conv|bn)_(\d)", r"\1\2"), (r"\bdownsample\b", "shortcut"), (r"\bfc\b", "linear"))


def read_checkpoint(path: str | Path) -> list[State]:
    """The state dict of every member in a checkpoint.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: not a checkpoint that can be read without running what it pickles, or no members in it.
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
    members = _members(content)
    if not members:
        raise WeightsError(
            f"checkpoint {str(path)!r} holds no CIFAR ResNet: expected a state dict with a first 'conv1.weight', or one for "
            "each member"
        )
    return members


def _members(content: Any) -> list[State]:
    """Descend through lists and dicts to the state dicts of networks; optimisers and the like are passed by."""
    if isinstance(content, dict):
        if any(FIRST.match(str(key)) for key in content):
            return [{key: value for key, value in content.items() if isinstance(value, Tensor)}]
        content = [content[key] for key in sorted(content, key=_natural)]
    return [state for part in content for state in _members(part)] if isinstance(content, list | tuple) else []


def _natural(key: object) -> list[tuple[int, str]]:
    """So that ``model_10`` comes after ``model_9``."""
    return [(int(part or 0), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(key))]


def translate(state: State) -> tuple[State, Normalization | None]:
    """A member's state dict with our names, and the normalisation stored beside the network, if any.

    Raises:
        WeightsError: it is not that of a CIFAR ResNet.
    """
    prefixes = [match.group() for key in state if (match := FIRST.match(key)) and "layer" not in key and "stage" not in key]
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
    return network, (found["mean"], found["std"]) if found else None


def architecture_of(network: State) -> tuple[str, int]:
    """Name of the architecture, and number of classes, of a translated state dict."""
    blocks = len({key.split(".")[1] for key in network if key.startswith("layer1.")})
    projection = "b" if any("shortcut" in key for key in network) else ""
    if "linear.weight" not in network:
        raise WeightsError("no CIFAR ResNet: it has no last layer 'linear' or 'fc'")
    return f"resnet{6 * blocks + 2}{projection}", len(network["linear.weight"])


def ensemble_from_checkpoint(
    paths: Sequence[str | Path],
    *,
    dataset: str = "cifar10",
    normalization: str = "cifar10",
    negative_slope: float = 0.0,
    vote: str = "softmax",
) -> tuple[Ensemble, dict[str, Any]]:
    """The members of one or several checkpoints, as an ensemble, and what a card must say to build it again.

    Args:
        normalization: ``"cifar10"``, ``"imagenet"`` or ``"none"``: what the members were trained with; where the checkpoint
            holds its own, that one.
        negative_slope: of the members' leaky ReLU (GAL's have 0.1), which a checkpoint does not tell.

    Raises:
        FileNotFoundError, WeightsError: see `read_checkpoint`; also where members differ in architecture or classes.
    """
    if normalization not in NORMALIZATIONS:
        raise unknown_name("normalization", normalization, NORMALIZATIONS)
    if not (math.isfinite(negative_slope) and negative_slope >= 0):
        raise ValueError(f"negative_slope is {negative_slope}: expected 0 (ReLU) or more")
    if dataset not in DATASETS:
        raise unknown_name("dataset", dataset, DATASETS)
    mean, std = NORMALIZATIONS[normalization]
    translated = [translate(state) for path in paths for state in read_checkpoint(path)]
    kinds = {architecture_of(network) for network, _ in translated}
    found = [own for _, own in translated if own is not None]
    if len(kinds) > 1 or any(own != found[0] for own in found):
        raise WeightsError(f"the members differ: {sorted(kinds)}: convert them one by one, then load 'ensemble:NAME+NAME'")
    architecture, num_classes = kinds.pop()
    if num_classes != NUM_CLASSES[dataset]:
        raise WeightsError(f"the checkpoint has {num_classes} classes, {dataset} has {NUM_CLASSES[dataset]}")
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


def convert(
    paths: Sequence[str | Path],
    name: str,
    *,
    model_dir: str | Path,
    dataset: str = "cifar10",
    normalization: str = "cifar10",
    negative_slope: float = 0.0,
) -> Path:
    """Make a model of published checkpoints, for ``load_model(name, model_dir, dataset)``; returns its card's path."""
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name {name!r} is to become a file's: use letters, digits, '_' and '-'")
    stem = Path(model_dir) / dataset / "Linf" / name
    if stem.with_suffix(".json").exists():
        raise FileExistsError(f"model_dir already holds {str(stem)!r}: choose another name, or remove it")
    ensemble, build = ensemble_from_checkpoint(
        paths, dataset=dataset, normalization=normalization, negative_slope=negative_slope
    )
    card = {"defense": f"converted from {', '.join(Path(path).name for path in paths)}", "dataset": dataset, **build}
    return write_model(stem, ensemble, card, half=False)
