"""Read and write a model's two files: ``<dataset>/<threat model>/<name>.safetensors`` and its card, ``<name>.json``.

The card holds what it takes to build the ensemble (architecture, members, and options of the architecture that are not its
defaults), the sha256 that the weights must have, and, to be read, where they come from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from defenses.architectures import ARCHITECTURES, MIXED, networks
from defenses.frontend import FRONT_ENDED
from defenses.multiresolution import SELF_ENSEMBLES, SelfEnsembles
from defenses.purified import PURIFIED
from defenses.randomized import RandomizedEnsemble
from ensemble_attacks.errors import WeightsError, said, unknown_name
from ensemble_attacks.files import FLOATING, read_whole, tensors_in, whole_file
from ensemble_attacks.models.ensembles import Ensemble
from ensemble_attacks.models.votes import VOTES, Vote
from ensemble_attacks.schema import Card, check, parse

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,199}")
NEEDED = {"architecture": str, "members": int, "sha256": str}  # of a card, by type (`schema.Card` has the rest)
MOST_CARD, MOST_WEIGHTS = 1 << 20, 2 << 30  # bytes that are read
OPTIONS = ("num_classes", "negative_slope", "normalization", "in_channels", "probabilities")  # where a card has them


def make_ensemble(
    architecture: str, members: int, vote: str = "softmax", probabilities: Sequence[float] | None = None, **options: Any
) -> Any:
    """Return an untrained ensemble of equal members, or of ``mixed`` ones; ``options`` are those of the architecture.

    Self-ensembles have a vote of their own, and one with ``probabilities`` draws its members and has none.
    """
    if architecture in SELF_ENSEMBLES:
        parts = [SELF_ENSEMBLES[architecture](**options) for _ in range(members)]
        return parts[0] if members == 1 else SelfEnsembles(parts)
    known = {**ARCHITECTURES, **FRONT_ENDED, **PURIFIED}
    chosen = networks(architecture, members)
    if unknown := next((name for name in chosen if name not in known), None):
        raise unknown_name("architecture", unknown, {**known, **SELF_ENSEMBLES, **MIXED})
    built = [known[name](**options) for name in chosen]
    return Ensemble(built, vote) if probabilities is None else RandomizedEnsemble(built, probabilities)


def check_name(name: str) -> None:
    """Raise a `ValueError` unless a model may be called so: its name names files."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"model name {name!r}: use letters, digits, '_' and '-', begin with a letter or digit, and stay within 200 "
            "characters"
        )


def read_card(stem: Path) -> dict[str, Any]:
    """Return the card ``<stem>.json``; raise a `WeightsError` if it does not say what it takes to build the model."""
    path = stem.with_suffix(".json")
    try:
        content = parse(read_whole(path, MOST_CARD))
        card = content if isinstance(content, dict) else {}
        lacking = [key for key, kind in NEEDED.items() if not isinstance(card.get(key), kind)]
        if not lacking:
            check(card, Card)
            return card
    except ValueError as error:
        raise WeightsError(f"the card {path} is no card ({error}): restore it, or train the model again") from None
    raise WeightsError(f"the card {path} does not say its {', '.join(lacking)}: restore it, or train the model again")


def read_model(stem: Path, vote: str = "softmax") -> Any:
    """Return the ensemble of ``<stem>.json`` and ``<stem>.safetensors``, in eval mode.

    Raises:
        WeightsError: Where the card says too little, or the weights are not those that it describes.
    """
    card = read_card(stem)
    weights = read_weights(stem.with_suffix(".safetensors"), card["sha256"])
    if card["members"] > len(weights):
        raise WeightsError(f"{stem}.safetensors holds {len(weights)} tensors, too few for {card['members']} members")
    options = {key: card[key] for key in OPTIONS if card.get(key) is not None}
    try:
        ensemble = make_ensemble(card["architecture"], card["members"], vote, **options)
    except (TypeError, ValueError) as error:
        raise WeightsError(
            f"the card {stem}.json describes no model ({said(error)}): restore it, or train it again"
        ) from None
    for key, value in ensemble.state_dict().items():
        if key in weights and value.is_floating_point() != (weights[key].dtype in FLOATING):
            raise WeightsError(f"{stem}.safetensors holds {key} as {weights[key].dtype}: expected {value.dtype}")
    try:
        ensemble.load_state_dict(weights)
    except RuntimeError as error:
        raise WeightsError(f"{stem}.safetensors does not fit {card['architecture']} x {card['members']}: {error}") from None
    return ensemble.eval()


def write_model(stem: Path, ensemble: nn.Module, card: dict[str, Any], *, half: bool) -> Path:
    """Store ``ensemble``, with ``half`` as `halved`, and its card, which gets the sha256; return the card's path."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in ensemble.state_dict().items()}
    content = save_safetensors(halved(state) if half else state)
    card = {"name": stem.name, **card, "sha256": hashlib.sha256(content).hexdigest()}
    path = stem.with_suffix(".json")
    with whole_file(path) as about, whole_file(stem.with_suffix(".safetensors")) as weights:  # the card takes its place last
        weights.write(content)
        about.write((json.dumps(card, indent=2) + "\n").encode())
    return path


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return convolutions and linear layers in half precision, and the rest as it is."""
    return {key: value.half() if value.is_floating_point() and value.dim() > 1 else value for key, value in state.items()}


def read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, in float32, after checking its digest.

    Raises:
        WeightsError: Where the file is missing, or its digest is another.
    """
    try:
        content = read_whole(path, MOST_WEIGHTS)
    except FileNotFoundError:
        raise WeightsError(
            f"the weights {path} are missing: install the package again, or train them (ensemble-attacks train)"
        ) from None
    except ValueError as error:
        raise WeightsError(f"{error}: fetch or train the weights again") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise WeightsError(f"the weights {path} have sha256 {found}, the card says {sha256}: fetch or train them again")
    try:
        tensors = tensors_in(content)
    except ValueError as error:
        raise WeightsError(f"the weights {path} are {error}: fetch or train them again") from None
    return {key: value.float() if value.dtype in FLOATING else value for key, value in tensors.items()}


@torch.no_grad()
def clean_accuracies(ensemble: Any, images: Tensor, labels: Tensor, device: str | torch.device) -> dict[str, Any]:
    """Return the accuracy on the test set, in percent, of each member and of each vote, or of the ensemble's own.

    If the ensemble is random, the accuracy is that of one draw.
    """
    ensemble.eval()
    batches = [ensemble.member_logits(batch.to(device)).cpu() for batch in images.split(500)]
    logits_MNK = torch.cat(batches, dim=1)
    votes = VOTES.values() if isinstance(ensemble, Ensemble) else [Vote("crossmax", ensemble.aggregate)]
    percent = lambda predicted: round(100 * (predicted == labels).double().mean().item(), 2)  # noqa: E731
    return {
        "n": len(labels),
        "members": [percent(logits_NK.argmax(1)) for logits_NK in logits_MNK],
        **{vote.name: percent(vote.aggregate(logits_MNK).argmax(1)) for vote in votes},
    }
