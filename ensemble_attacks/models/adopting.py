"""Make an ensemble that attacks look into of anybody's model: of members that are named, or of what its structure tells."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ensemble_attacks.errors import NotAnEnsembleError, out_of_memory
from ensemble_attacks.models.adopted import AdoptedEnsemble, check_protocol
from ensemble_attacks.models.ask import as_module, check_dtype, classes_of
from ensemble_attacks.models.ensembles import Ensemble, shows_members
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.recognised import LOOKED_FOR, Found, lists_in, named_members, networks_of, recognise
from ensemble_attacks.models.together import Together
from ensemble_attacks.models.votes import VOTES, Aggregate, Vote, as_vote

logger = logging.getLogger(__name__)


def as_ensemble(
    model: nn.Module | Sequence[nn.Module],
    members: str | nn.Module | Sequence[nn.Module | str] | None = None,
    vote: str | Vote | Aggregate | None = None,
    *,
    member_logits: Callable[[Tensor], Any] | None = None,
    weights: Sequence[float] | None = None,
    inputs: Tensor | None = None,
) -> nn.Module:
    """Adopt a third party's ensemble without rewriting it.

    Args:
        model: anything (N, C, H, W) -> (N, K). Without ``members`` and ``member_logits`` it shows ``member_logits`` and
            ``aggregate`` itself, and is returned as it is, or its structure is recognised (`models.recognised`): a list of
            networks, a wrapper of an ensemble, torchensemble's and torch-uncertainty's classifiers, and with ``inputs``,
            anything that holds a list of networks whose vote, by any of ``VOTES``, predicts as it does.
        members: its classifiers, as modules or as names of submodules (``["net.0", "net.1"]``), or the list that holds them
            (``"net"``): of a ModuleList, a ModuleDict, or by itself a Sequential, the children are meant, in order.
        vote: how it combines them: a name, a `Vote`, or a function (M, N, K) -> (N, K); ``None``: what the structure says,
            or ``"softmax"``.
        member_logits: in place of ``members``, a function of images to the logits (M, N, K) of members that one network
            computes together, or their rows (M * N, K), those of the first member first.
        weights: a weight for each member in a named vote; ``None``: all the same.
        inputs: real images to check the claim on at once; otherwise it is checked on those attacked.

    Returns:
        An ensemble whose forward pass is that of ``model``, or ``model`` itself; where ``model`` has no scores of its own (a
        list, rows of all members), an ensemble by that vote. ``found`` says what was recognised, ``checked`` on how many
        images the claim was true.

    Raises:
        NotAnEnsembleError: Where no members are named, the model shows none, and its structure is none that is known.
        AggregateMismatchError: Where the claimed members and vote do not reproduce the model's own predictions.
        TypeError: Where weights are given for a vote without a name, or both ``members`` and ``member_logits``.
        ValueError: Where a name in ``members`` is no submodule, the vote is unknown, or there is not one weight for each
            member.

    >>> import torch
    >>> nets = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
    >>> class Theirs(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.nets = nets
    ...     def forward(self, x):
    ...         return sum(net(x) for net in self.nets)
    >>> as_ensemble(Theirs(), members=["nets.0", "nets.1"], vote="logits", inputs=torch.rand(8, 4)).vote
    'logits'
    """
    if members is not None and member_logits is not None:
        raise TypeError("members and member_logits both name the members: pass one of them")
    if members is None and member_logits is None:
        return _recognised(model, vote, weights, inputs)
    model = as_module(model)
    named = [Together(member_logits)] if member_logits is not None else named_members(model, members)  # type: ignore[arg-type]
    return _checked(AdoptedEnsemble(model, named, vote or "softmax", weights), inputs)


def _recognised(
    model: Any, vote: str | Vote | Aggregate | None, weights: Sequence[float] | None, inputs: Tensor | None
) -> nn.Module:
    """Return what shows its members, or an ensemble of those that the structure tells."""
    nets = networks_of(model)
    if nets is None and shows_members(model := as_module(model)):
        return _checked(model, inputs)
    found = recognise(model) if nets is None else Found(f"a list of {len(nets)} networks", nets, "softmax", own_scores=False)
    if found is None or (nets is None and not found.own_scores and _scores_itself(model, inputs)):
        found = _tried(model, vote, weights, inputs)
    claimed = found.vote if vote is None else vote
    if found.own_scores:
        adopted: Ensemble = AdoptedEnsemble(model, found.members, claimed, weights)
    else:
        adopted = Ensemble(found.members, as_vote(claimed) if callable(claimed) else claimed, weights)
        adopted.training = adopted.members.training = any(net.training for net in found.members)
    adopted.found = found.said
    return _checked(adopted, inputs)


def _scores_itself(model: nn.Module, inputs: Tensor | None) -> bool:
    """Tell whether a model answers with scores (N, K) rather than rows of all members, as far as images can say."""
    if inputs is None:
        return False
    try:
        with guarded(model):
            classes_of(model, inputs)
    except (TypeError, ValueError):
        return False
    return True


def _tried(
    model: nn.Module, vote: str | Vote | Aggregate | None, weights: Sequence[float] | None, inputs: Tensor | None
) -> Found:
    """Return the first list of networks in a model whose vote predicts as the model does.

    Raises:
        NotAnEnsembleError: Where there is none; says what was looked for.
    """
    lists = list(lists_in(model))
    fitting: list[Found] = []
    for (name, nets), claimed in itertools.product(lists if inputs is not None else (), VOTES if vote is None else [vote]):
        candidate = AdoptedEnsemble(model, nets, claimed, weights)
        try:
            _checked(candidate, inputs)
        except Exception as error:  # what is no member fails in its own way
            if out_of_memory(error):
                raise
            logger.debug("%s of %s by %s: %s", name, type(model).__name__, candidate.vote_said, error)
        else:
            fitting.append(Found(f"{len(nets)} networks in {name}, by {candidate.vote_said}", nets, claimed))  # type: ignore[arg-type]
    if fitting:
        others = f" (fits as well: {'; '.join(one.said for one in fitting[1:])})" if fitting[1:] else ""
        return replace(fitting[0], said=fitting[0].said + others)
    holds = f"it holds {', '.join(repr(name) for name, _ in lists)}" if lists else "it holds no list of networks"
    tried = "none of which predicts as it does" if inputs is not None else "to be tried where inputs are passed"
    raise NotAnEnsembleError(
        f"as_ensemble recognises no members in {type(model).__name__}. It looked for {LOOKED_FOR}; {holds}"
        f"{', ' + tried if lists else ''}. Name them: as_ensemble(model, members=[...], vote=...), or "
        "as_ensemble(model, member_logits=function, vote=...) with a function of images to (M, N, K)"
    )


def _checked(model: nn.Module, inputs: Tensor | None) -> nn.Module:
    """Return the model, checked on images where there are any."""
    if inputs is not None:
        if not len(inputs):
            raise ValueError("inputs holds no images: pass some of those that are attacked")
        with guarded(model):
            check_dtype(model, inputs, "inputs")
            classes_of(model.original if isinstance(model, AdoptedEnsemble) else model, inputs)
            check_protocol(model, inputs)
    return model
