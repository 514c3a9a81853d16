"""Check what a model's structure says: randomness, memory, aggregation, the kind of its scores."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ensemble_attacks.diagnostics.examination import ALONE, Examination
from ensemble_attacks.diagnostics.findings import NOTE, Check, flag_if
from ensemble_attacks.errors import AggregateMismatchError
from ensemble_attacks.models.adopted import check_protocol
from ensemble_attacks.models.ask import ask
from ensemble_attacks.models.preserve import private_random_state
from ensemble_attacks.scores import are_probabilities, differ


def of_structure(examined: Examination, training: bool) -> Iterator[Check]:
    structure = examined.structure
    yield Check("members", NOTE, float(structure.members), None, "shows its members" if structure.members else "one model")
    said = "parts called frontend stand before the classifier; their gradient may mislead"
    yield flag_if(structure.frontend, "frontend", said, "bpda", "[A18] BPDA")
    said = "the members are put together otherwise than by mean probability, votes or mean logits"
    yield flag_if(structure.own_aggregation, "aggregation", said, "crossmax-transfer", "arXiv:2411.14834")
    said = "members and aggregation predict otherwise than the model itself: attacks on them are misled"
    yield flag_if(structure.members and _contradicts_itself(examined), "protocol", said)
    said = "the same images get different scores: gradients and single predictions are draws"
    yield flag_if(structure.random, "random", said, "eot-apgd", "[A18] EOT")
    said = "a forward pass sets the global random generator anew: its noise is the same in every call"
    yield flag_if(_reseeds(examined), "reseeds", said, "eot-apgd")
    said = "the same images and random state get different scores: it remembers what it has seen"
    yield flag_if(_remembers(examined), "stateful", said, "square")
    said = "was in training mode, where predictions depend on the batch: attacked and judged in eval mode"
    yield flag_if(training, "training_mode", said)
    said = "an image's scores depend on the others in the batch"
    yield flag_if(not structure.random and _depends_on_batch(examined), "batch_dependence", said)
    with torch.no_grad():
        scores_NK = ask(examined.original, examined.x)
    probabilities = are_probabilities(scores_NK)
    yield flag_if(probabilities, "probabilities", "the scores are probabilities, whose logarithm underflows", "", "[CH20]")


def _contradicts_itself(examined: Examination) -> bool:
    try:
        check_protocol(examined.original, examined.x[:ALONE])
    except AggregateMismatchError:
        return True
    return False


@torch.no_grad()
def _reseeds(examined: Examination) -> bool:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        ask(examined.original, examined.x[:2])
        states.append(torch.get_rng_state())
    return torch.equal(*states)


@torch.no_grad()
def _remembers(examined: Examination) -> bool:
    scores = []
    for _ in range(4):
        with private_random_state(examined.seed, examined.original):
            scores.append(ask(examined.original, examined.x))
    return any(differ(other, scores[0]) for other in scores[1:])


@torch.no_grad()
def _depends_on_batch(examined: Examination) -> bool:
    half = len(examined.x) // 2
    return differ(ask(examined.original, examined.x)[:half], ask(examined.original, examined.x[:half]))
