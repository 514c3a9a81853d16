"""Recognise ensembles by their structure: lists, wrappers, and the classes of two libraries, by name alone.

- torchensemble keeps members in ``estimators_``, and its forward pass is a formula of each class: the mean of their
  probabilities, the most votes, or the softmax of the mean or the sum of their outputs.
- torch-uncertainty's networks return the rows of all members, (M * N, K), which its routine turns into the mean of
  their probabilities; they have no scores (N, K) of their own.

What is recognised is a claim like any other, and `as_ensemble` checks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ensemble_attacks.errors import NotAnEnsembleError, unknown_name
from ensemble_attacks.models.ask import as_module, member_probabilities
from ensemble_attacks.models.ensembles import shows_members
from ensemble_attacks.models.together import Together
from ensemble_attacks.models.votes import Vote, vote_of

# what a wrapper calls the network that it holds, by the name of its class; of two, the first that is there
WRAPPERS = {
    "DataParallel": ("module",),
    "AveragedModel": ("module",),
    "SWA": ("swa_model", "core_model"),
    "EMA": ("ema_model",),
    "LightningModule": ("model",),
}
MEAN_PROBABILITY = {
    "VotingClassifier",
    "BaggingClassifier",
    "SnapshotEnsembleClassifier",
    "AdversarialTrainingClassifier",
    "NeuralForestClassifier",
}
MEAN_OUTPUT = {  # or their sum, times a number, which decides alike
    "FusionClassifier",
    "FastGeometricClassifier",
    "GradientBoostingClassifier",
    "SoftGradientBoostingClassifier",
}
STACKED = {"SWAG": "samples", "StochasticModel": "num_samples"}  # that do not say num_estimators
LOOKED_FOR = (
    "member_logits and aggregate; a list of networks; a wrapper (DataParallel, AveragedModel, SWA, EMA, Lightning's .model) "
    "of what is known; torchensemble's classifiers; torch-uncertainty's num_estimators"
)


@dataclass(frozen=True)
class Found:
    """A record of what a structure says of its members.

    Attributes:
        said: what was recognised.
        members: the members, as `Ensemble` takes them.
        vote: how they are put together.
        own_scores: whether the model itself answers with the ensemble's scores, against which the claim can be checked.
    """

    said: str
    members: Sequence[nn.Module]
    vote: str | Vote
    own_scores: bool = True


def recognise(model: nn.Module) -> Found | None:
    """Return what a model's structure says of its members; ``None`` where it is none that is known.

    Raises:
        NotAnEnsembleError: Where it is an ensemble that has not been fitted, or a wrapper of one that draws its members.
    """
    inner, path = _inside(model)
    within = f"{type(inner).__name__} in .{'.'.join(path)} of {type(model).__name__}" if path else type(inner).__name__
    if path and shows_members(inner):
        if member_probabilities(inner) is not None:
            raise NotAnEnsembleError(f"{within} draws its members, so that no claim can be checked: pass .{'.'.join(path)}")
        return Found(within, [Together(inner.member_logits)], replace(vote_of(inner), joined=None))  # type: ignore[arg-type]
    names = _names(inner)
    estimators = getattr(inner, "estimators_", None)
    if (named := (MEAN_PROBABILITY | MEAN_OUTPUT) & names) and isinstance(estimators, nn.ModuleList):
        if not len(estimators):
            raise NotAnEnsembleError(f"{within} has no estimators yet: fit it, or load its weights, first")
        soft = "voting" if getattr(inner, "voting_strategy", "soft") == "hard" else "softmax"
        vote = soft if named & MEAN_PROBABILITY else "logits"
        return Found(f"torchensemble's {within}, {len(estimators)} estimators", list(estimators), vote)
    if (said := _stacks(inner)) is not None:
        return Found(
            f"torch-uncertainty's {within}, rows of all members together ({said})", [Together(model)], "softmax", False
        )
    return None


def networks_of(model: object) -> list[nn.Module] | None:
    """Return the networks of what is nothing but a list, or a mapping, of them; ``None`` where it is something else."""
    if type(model) in (nn.ModuleList, nn.ModuleDict):
        return _held(model)  # type: ignore[arg-type]
    if isinstance(model, Mapping):
        model = list(model.values())
    return [as_module(net) for net in model] if isinstance(model, (list, tuple)) else None


def lists_in(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Yield the lists of at least two networks that a model holds, with their names, the outermost first."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1:
            yield name or "itself", _held(module)


def named_members(model: nn.Module, members: str | nn.Module | Sequence[nn.Module | str]) -> list[nn.Module]:
    """Return the members that are named, or meant by the list that holds them.

    Raises:
        ValueError: Where a name is no submodule; the message names the nearest one.
    """
    known = dict(model.named_modules())

    def one(member: nn.Module | str) -> nn.Module:
        if isinstance(member, str) and member not in known:
            raise unknown_name(f"submodule of {type(model).__name__}", member, [name for name in known if name])
        return known[member] if isinstance(member, str) else member

    if isinstance(members, (str, nn.Module)):
        alone = one(members)
        return _spread(list(alone) if isinstance(alone, nn.Sequential) else [alone])
    return _spread([one(member) for member in members])


def _spread(members: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the members, with the children of lists of networks in their place."""
    spread: list[nn.Module] = []
    for member in members:
        spread += _spread(_held(member)) if isinstance(member, (nn.ModuleList, nn.ModuleDict)) else [member]
    return spread


def _held(networks: nn.ModuleList | nn.ModuleDict) -> list[nn.Module]:
    """Return the networks of a list, in order, one that stands in it twice included."""
    return list(networks.values() if isinstance(networks, nn.ModuleDict) else networks)


def _names(model: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(model).__mro__}


def _inside(model: nn.Module) -> tuple[Any, list[str]]:
    """Return the network inside all wrappers, and the names that lead to it."""
    path: list[str] = []
    while not shows_members(model) and "SWAG" not in _names(model):
        held = [name for kind in WRAPPERS.keys() & _names(model) for name in WRAPPERS[kind]]
        name = next((name for name in held if isinstance(getattr(model, name, None), nn.Module)), None)
        if name is None:
            break
        model = getattr(model, name)
        path.append(name)
    return model, path


def _stacks(model: nn.Module) -> str | None:
    """Return by what a network, or one of its layers, says that it answers for several members at once."""
    for part in model.modules():
        if kinds := STACKED.keys() & _names(part):
            return STACKED[kinds.pop()]
        number = getattr(part, "num_estimators", None)
        if isinstance(number, (int, Tensor)) and int(number) > 1:
            return f"num_estimators={int(number)} of {type(part).__name__}"
    return None
