"""Read what others published: the state dicts of networks in a checkpoint, and the numbers that stand beside them.

Pickled code is never run.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemble_attacks.errors import WeightsError
from ensemble_attacks.files import load_tensors

State = dict[str, Tensor]
Normalization = tuple[list[float], list[float]]
DEEPEST = 8  # levels of lists and dicts that are looked into
FIRST = re.compile(r"(?:^|.*\.)(?=conv_?1\.weight$)")
RENAMED = ((r"stage_(\d)", r"layer\1"), (r"(conv|bn)_(\d)", r"\1\2"), (r"\bdownsample\b", "shortcut"), (r"\bfc\b", "linear"))


PROBABILITIES = re.compile(r"(?:^|_)(?:alphas?|probs?|probability|probabilities)$")
WEIGHTS = re.compile(r"(?:^|_)(?:weights|coefficients)$")  # a network's own are called weight
OF_TRAINING = re.compile(  # names of what is no part of a defense
    r"^(?:args?|config|cfg|hparams|hyper_?parameters|opt|metrics?|logs?|history|rng_?states?)$|optim|sched|momentum|buffer|"
    r"acc|loss|err|epoch|seed|(?:^|_)lrs?$|time|best|top|step|iter|prec|version"
)
MOST = 4096  # numbers that belong to a defense


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        members: the state dict of every member.
        numbers: the numbers that stand beside these, by name, but for those that training left.
        slopes: the slopes of the members' leaky ReLU that it states, 0 for ReLU: one, if at all.
    """

    members: list[State]
    numbers: dict[str, list[float]]
    slopes: set[float]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Return the state dict of every member in a checkpoint, and what it says of the ensemble.

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
    numbers: dict[str, list[float]] = defaultdict(list)
    slopes: set[float] = set()
    for names, value in _beside(content):
        if names and not any(OF_TRAINING.search(name) for name in names):
            numbers[names[-1]] += _numbers(value)
        slopes |= _slope(names, value)
    return Checkpoint(members, {name: found for name, found in numbers.items() if found}, slopes)


def _beside(content: Any, names: tuple[str, ...] = (), depth: int = 0) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield what is no part of a network in a checkpoint, below the names under which it stands, numbers apart."""
    if isinstance(content, argparse.Namespace):
        content = vars(content)
    keys = [str(key) for key in content] if isinstance(content, dict) else []
    several = bool(keys) if isinstance(content, dict) and not all(map(str.isdigit, keys)) else not _numbers(content)
    if depth > DEEPEST or not isinstance(content, dict | list | tuple) or not several:
        yield names, content
        return
    network = any(map(FIRST.match, keys))
    items: Iterable[tuple[Any, Any]] = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in sorted(items, key=lambda item: _natural(item[0])):
        own = [part for part in str(key).lower().split(".") if not part.isdigit()]
        if not network or (own and _is_defenses(own[-1])):
            yield from _beside(value, (*names, *own[-1:]), depth + 1)


def _is_defenses(name: str) -> bool:
    return bool(PROBABILITIES.search(name) or WEIGHTS.search(name))


def _numbers(value: Any) -> list[float]:
    """Return the numbers that a value is, or is made of; none where it is something else."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, str | bool) or (isinstance(value, Tensor | np.ndarray | list | tuple) and len(np.shape(value)) > 2):
        return []
    try:
        found = torch.as_tensor(value, dtype=torch.float64).flatten()
    except (TypeError, ValueError, RuntimeError):  # of strings, None, state dicts, ...
        return []
    return found.tolist() if len(found) <= MOST else []


def _slope(names: tuple[str, ...], value: Any) -> set[float]:
    """Return the slope of the members' leaky ReLU that an entry of a checkpoint states, if it does."""
    name = names[-1] if names else ""
    if name == "negative_slope" and len(numbers := _numbers(value)) == 1:
        return set(numbers)
    plain = (name == "activation" and str(value).lower() == "relu") or (name == "leaky_relu" and value in (False, 0))
    return {0.0} if plain else set()


def probabilities_of(numbers: dict[str, list[float]], members: int) -> list[float] | None:
    """Return the probabilities by which an ensemble draws its members, where it has such numbers.

    Raises:
        WeightsError: Where numbers that stand beside the members are, or may be, the ensemble's and no probabilities.
    """
    if members < 2:
        return None
    remedy = "save the members' state dicts alone for a plain ensemble, or build the defense in code"
    found = {name: values for name, values in numbers.items() if PROBABILITIES.search(name)}
    for name, values in numbers.items():
        if name not in found and (len(values) == members or WEIGHTS.search(name)):
            raise WeightsError(f"{name!r} holds {len(values)} numbers for {members} members, of unknown meaning: {remedy}")
    for name, values in found.items():
        sound = len(values) == members and min(values) >= 0 and math.isclose(sum(values), 1, abs_tol=1e-4)
        if not sound or values != next(iter(found.values())):
            raise WeightsError(
                f"{name!r} is {values[:9]}, which are not the probabilities of {members} members (at least 0, of sum 1): "
                f"{remedy}"
            )
    return [value / sum(values) for value in values] if found else None


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
        state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        return _split({key: value for key, value in state.items() if not _is_defenses(key.lower().split(".")[-1])})
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
    """Return the name of the architecture, and the number of classes, of a translated state dict.

    It has one of ours if it has three stages; else it is called as torchvision calls it.
    """
    if "linear.weight" not in network:
        raise WeightsError("no CIFAR ResNet: it has no last layer 'linear' or 'fc'")
    blocks = [len({key.split(".")[1] for key in network if key.startswith(f"layer{stage}.")}) for stage in range(1, 10)]
    blocks = [count for count in blocks if count]
    convolutions = 3 if any(key.endswith("conv3.weight") for key in network) else 2
    projection = "b" if any("shortcut" in key for key in network) and len(blocks) == 3 and convolutions == 2 else ""
    return f"resnet{convolutions * sum(blocks) + 2}{projection}", len(network["linear.weight"])
