"""Load models by name: those that ship, those trained or converted here, and ensembles of anybody's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from defenses.architectures import ARCHITECTURES
from defenses.multiresolution import SELF_ENSEMBLES
from defenses.zoo.cards import check_name, read_card, read_model
from defenses.zoo.convert import ensemble_from_checkpoint
from ensemble_attacks.data import DATASETS
from ensemble_attacks.errors import unknown_name
from ensemble_attacks.models import providers
from ensemble_attacks.models.ensembles import Ensemble
from ensemble_attacks.models.votes import VOTES, check_vote
from ensemble_attacks.validation import check_choice

logger = logging.getLogger(__name__)
SHIPPED = Path(__file__).parents[1] / "weights"
THREAT_MODELS = ("Linf",)


def list_models(dataset: str | None = None, model_dir: str | Path | None = None) -> list[str]:
    """Return the names of the models that can be loaded, ``<defense>_<architecture>_<members>``, of one dataset or of all.

    >>> "adp_convnet_3" in list_models("digits")
    True
    """
    dataset = dataset and _named("dataset", dataset, tuple(DATASETS))
    return sorted({card.stem for folder in _folders(model_dir) for card in folder.glob(f"{dataset or '*'}/*/*.json")})


def _named(kind: str, value: object, known: Sequence[str]) -> str:
    """Return one of the known names, given as such, or as RobustBench's enum; raise a `ValueError` for any other."""
    name = str(getattr(value, "value", value))
    check_choice(kind, name, known)
    return name


def _folders(model_dir: str | Path | None) -> list[Path]:
    """Return where models are looked for, in this order."""
    return [Path(model_dir), SHIPPED] if model_dir else [SHIPPED]


def load_model(
    model_name: str,
    model_dir: str | Path | None = None,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    *,
    vote: str = "softmax",
    checkpoint: str | Path | None = None,
    negative_slope: float | None = None,
    norm: str | None = None,
) -> Any:
    """Load an ensemble defense: images (N, C, H, W) in [0, 1] -> logits (N, K).

    The arguments are RobustBench's, the vote, and a published checkpoint.

    Args:
        model_name: one of ``list_models(dataset)``; or any other name that `ensemble_attacks.models.providers.load_model`
            knows, such as ``"ensemble:A+B"``, ``"robustbench:NAME"``, ``"timm:NAME"`` or ``"file.py:function"``; or, with
            ``checkpoint``, ``<defense>_<architecture>_<members>``.
        model_dir: a folder that holds ``<dataset>/<threat model>/<name>.safetensors``; the models that ship come after it.
        dataset, threat_model: names, or RobustBench's enums.
        vote: ``"softmax"``, ``"voting"`` or ``"logits"``.
        checkpoint: a published file to take the weights from (see `defenses.convert`, which has more options; with
            CIFAR-10's normalisation). One that holds probabilities of its members is a randomised ensemble, without a vote.
        negative_slope: the slope of the leaky ReLU of a checkpoint's members, where it does not state it.
        norm: RobustBench's older name of ``threat_model``.

    Returns:
        The model, in eval mode; a self-ensemble (``multiresolution``) has an aggregation of its own and no vote.

    Raises:
        ValueError: Where a model, dataset, threat model or vote is unknown; the message names the nearest known one.
        FileNotFoundError: Where there is no such checkpoint.
        WeightsError: Where the weights are not those that the card, or the name, describes.
    """
    dataset = _named("dataset", dataset, tuple(DATASETS))
    threat_model = _named("threat model", norm or threat_model, THREAT_MODELS)
    check_vote(vote)
    if checkpoint is not None:
        return _load_checkpoint(model_name, checkpoint, dataset, vote, negative_slope)
    if ":" in model_name:
        return providers.load_model(model_name, model_dir, dataset, threat_model, vote=vote)
    return read_model(_stem(model_name, model_dir, dataset, threat_model), vote)


def model_card(
    model_name: str, model_dir: str | Path | None = None, dataset: str = "cifar10", threat_model: str = "Linf"
) -> dict[str, Any]:
    """Return the card of the model that `load_model` finds under this name.

    Raises:
        ValueError: Where there is no such model; the message names the nearest one.
    """
    dataset = _named("dataset", dataset, tuple(DATASETS))
    return read_card(_stem(model_name, model_dir, dataset, _named("threat model", threat_model, THREAT_MODELS)))


def _stem(model_name: str, model_dir: str | Path | None, dataset: str, threat_model: str) -> Path:
    """Return the path of a model's files, without their suffixes; raise a `ValueError` for a name that leads elsewhere."""
    check_name(model_name)
    for folder in _folders(model_dir):
        stem = folder / dataset / threat_model / model_name
        if stem.with_suffix(".json").exists():
            if model_dir and folder == SHIPPED:
                logger.info("%s is not in model_dir %s: it is the one that ships", model_name, model_dir)
            elif model_dir and (SHIPPED / dataset / threat_model / f"{model_name}.json").exists():
                logger.info("%s is the one in model_dir %s, not the one of this name that ships", model_name, model_dir)
            return stem
    raise unknown_name(f"model for {dataset}", model_name, list_models(dataset, model_dir))


def _load_checkpoint(
    model_name: str, checkpoint: str | Path, dataset: str, vote: str, negative_slope: float | None
) -> Ensemble:
    _, *build = model_name.rsplit("_", 2)
    if len(build) != 2 or build[0] not in ARCHITECTURES or not build[1].isdigit():
        raise ValueError(
            f"model_name {model_name!r}: with a checkpoint it is <defense>_<architecture>_<members>, as gal_resnet20_3"
        )
    return ensemble_from_checkpoint(checkpoint, dataset=dataset, negative_slope=negative_slope, vote=vote, name=model_name)[
        0
    ]


def register_with_robustbench() -> list[str]:
    """Make RobustBench's own ``load_model`` find the models that ship; return their names there.

    ``robustbench.load_model("Gal_resnet20_3", dataset="cifar10", threat_model="Linf")`` is `load_model("gal_resnet20_3")`;
    with another vote, ``"Gal_resnet20_3_voting"`` or ``"Gal_resnet20_3_logits"``. Calling it again changes nothing.

    Raises:
        ImportError: Where robustbench cannot be imported; the message names the command that mends it.
        ValueError: Where RobustBench has a model of that name already; nothing has been registered.
    """
    from ensemble_attacks.robustbench import ensure

    ensure()
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    from robustbench.model_zoo.models import model_dicts

    zoo = model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf]
    entries = {}
    for name in list_models("cifar10"):
        self_ensemble = model_card(name)["architecture"] in SELF_ENSEMBLES
        for vote in ("softmax",) if self_ensemble else VOTES:
            ours = name.capitalize() + ("" if vote == "softmax" else f"_{vote}")
            entries[ours] = {"model": partial(load_model, name, vote=vote), "gdrive_id": []}  # [] is: nothing to download
    taken = [name for name in entries if name in zoo and not isinstance(zoo[name]["model"], partial)]
    if taken:
        raise ValueError(f"RobustBench has a model {taken[0]!r} of its own: rename ours")
    zoo.update(entries)
    return list(entries)
