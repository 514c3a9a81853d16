"""Make models of ours of weights that others published.

Read are torch checkpoints of CIFAR ResNets (He et al. 2016) in the layouts of DVERGE's repository (members under
``model_0``, ``model_1``, ..., each a network and its normaliser), of akamaster's (``state_dict``, ``module.`` prefixes),
plain state dicts, and those of a whole ensemble (``members.0.``, ...); shortcuts with or without a projection. Probabilities
of the members (``alpha``, ``prob``, ``probabilities``) make a randomised ensemble.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from defenses.architectures import ARCHITECTURES, NORMALIZATIONS
from defenses.gal import NAME as GAL
from defenses.gal import NEGATIVE_SLOPE
from defenses.zoo.cards import check_name, make_ensemble, write_model
from defenses.zoo.checkpoints import Checkpoint, architecture_of, probabilities_of, read_checkpoint, translate
from ensemble_attacks.data import DATASETS
from ensemble_attacks.errors import WeightsError, unknown_name
from ensemble_attacks.models.ensembles import Ensemble


def ensemble_from_checkpoint(
    paths: str | Path | Sequence[str | Path],
    *,
    dataset: str = "cifar10",
    normalization: str = "cifar10",
    negative_slope: float | None = None,
    vote: str = "softmax",
    name: str | None = None,
) -> tuple[Ensemble, dict[str, Any]]:
    """Return the members of one or several checkpoints, as an ensemble, and what a card must say to build it again.

    Args:
        paths: one checkpoint, or several.
        dataset: the name of the dataset.
        normalization: what the members were trained with, ``"cifar10"``, ``"imagenet"`` or ``"none"``; where the checkpoint
            holds a normalisation of its own, it is that one.
        negative_slope: the slope of the members' leaky ReLU (GAL's have 0.1), 0 for ReLU; ``None``: what the checkpoint
            states as ``negative_slope``, or ReLU, but for a model that is called GAL's.
        vote: the ensemble's vote; one that has probabilities of its members draws them, and has none.
        name: the name of the model, which may say what is to be found.

    Raises:
        ValueError: Where an argument cannot be used.
        FileNotFoundError, WeightsError: As `read_checkpoint` raises them; also where members differ in architecture,
            channels or classes, do not take the dataset's images, or cannot be built here, and where numbers stand beside
            them whose meaning is unknown (`probabilities_of`), or ``name`` says other than what is found.
    """
    if normalization not in NORMALIZATIONS:
        raise unknown_name("normalization", normalization, NORMALIZATIONS)
    if negative_slope is not None and not (math.isfinite(negative_slope) and negative_slope >= 0):
        raise ValueError(f"negative_slope is {negative_slope}: expected 0 (ReLU) or more")
    if dataset not in DATASETS:
        raise unknown_name("dataset", dataset, DATASETS)
    mean, std = ([0.0], [1.0]) if normalization == "none" else NORMALIZATIONS[normalization]
    checkpoints = [read_checkpoint(path) for path in listed(paths)]
    translated = [translate(state) for checkpoint in checkpoints for state in checkpoint.members]
    kinds = {architecture_of(network) for network, _ in translated}
    found = [own for _, own in translated if own is not None]
    channels = (DATASETS[dataset].shape or (3,))[0]
    if any(len(part) not in (1, channels) for own in found for part in own):
        raise WeightsError(f"the normalisation is {found[0]}: expected one number, or one for each of {channels} channels")
    if len(kinds) > 1 or any(own != found[0] for own in found):
        raise WeightsError(f"the members differ: {sorted(kinds)}: convert them one by one, then load 'ensemble:NAME+NAME'")
    architecture, num_classes = kinds.pop()
    if architecture not in ARCHITECTURES:
        raise WeightsError(
            f"the checkpoint is a {architecture}, not one that can be built here ({', '.join(ARCHITECTURES)}): build it in "
            "code, and pass ensemble_attacks.Ensemble([...])"
        )
    taken = {network["conv1.weight"].shape[1] for network, _ in translated}
    if taken != {channels}:
        raise WeightsError(f"the checkpoint takes images of {max(taken)} channels, those of {dataset} have {channels}")
    if num_classes != DATASETS[dataset].classes:
        raise WeightsError(f"the checkpoint has {num_classes} classes, {dataset} has {DATASETS[dataset].classes}")
    options: dict[str, Any] = {"num_classes": num_classes, "normalization": found[0] if found else (list(mean), list(std))}
    if len(options["normalization"][0]) not in (1, channels):
        raise WeightsError(f"normalization {normalization!r} has 3 channels, images of {dataset} {channels}: name 'none'")
    if channels != 3:
        options["in_channels"] = channels
    if slope := _slope(checkpoints, negative_slope, name):
        options["negative_slope"] = slope
    if probabilities := _probabilities(checkpoints):
        options["probabilities"] = probabilities
    ensemble = make_ensemble(architecture, len(translated), vote, **options)
    for member, (network, _) in zip(ensemble.members, translated, strict=True):
        try:
            member.load_state_dict(network)
        except RuntimeError as error:
            raise WeightsError(f"the checkpoint is not a {architecture}: {' '.join(str(error).split())}") from None
    build = {"architecture": architecture, "members": len(translated), **options}
    if name is not None:
        check_build(name, build)
    return ensemble.eval(), build


def _slope(checkpoints: Sequence[Checkpoint], given: float | None, name: str | None) -> float:
    """Return the slope that is given, or else stated.

    Raises:
        WeightsError: Where one contradicts another, or a model is called GAL's, and nobody states it: a name alone does not.
    """
    slopes = {slope for checkpoint in checkpoints for slope in checkpoint.slopes} | ({given} if given is not None else set())
    if len(slopes) > 1:
        raise WeightsError(
            f"negative_slope is said to be {' and '.join(map(str, sorted(slopes)))}, by the argument and the checkpoints: "
            "pass the one that the members were trained with, and checkpoints that say no other"
        )
    if not slopes and name is not None and name.lower().split("_")[0] == GAL:
        raise WeightsError(
            f"negative_slope of {name!r} is stated by no argument and not by the checkpoint: pass {NEGATIVE_SLOPE} for the "
            "leaky ReLU of GAL's members, or 0 for ReLU (--negative-slope)"
        )
    return slopes.pop() if slopes else 0.0


def _probabilities(checkpoints: Sequence[Checkpoint]) -> list[float] | None:
    """Return the probabilities of the members of one checkpoint, or of several with one number each."""
    numbers: dict[str, list[float]] = {}
    for checkpoint in checkpoints:
        for name, values in checkpoint.numbers.items():
            numbers[name] = numbers.get(name, []) + values
    return probabilities_of(numbers, sum(len(checkpoint.members) for checkpoint in checkpoints))


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
        name: the name of the model, which may say what is to be found.
        model_dir: the folder of the new model.
        dataset, normalization, negative_slope: the arguments of `ensemble_from_checkpoint` of these names.

    Raises:
        FileExistsError: Where there is a model of this name already.
        ValueError, FileNotFoundError, WeightsError: As `ensemble_from_checkpoint` raises them.
    """
    check_name(name)
    stem = Path(model_dir) / dataset / "Linf" / name
    if stem.with_suffix(".json").exists():
        raise FileExistsError(f"model_dir already holds {str(stem)!r}: choose another name, or remove it")
    ensemble, build = ensemble_from_checkpoint(
        paths, dataset=dataset, normalization=normalization, negative_slope=negative_slope, name=name
    )
    files = ", ".join(Path(path).name for path in listed(paths))
    card = {"defense": f"converted from {files}", "dataset": dataset, **build}
    return write_model(stem, ensemble, card, half=False)
