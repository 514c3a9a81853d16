"""Provide the recipes by name, and the one call that makes a model of one."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defenses import adp, adversarial, dverge, frontend, gal, igat, multiresolution, purified, standard, trs
from defenses.adversarial import with_adversarial_training
from defenses.architectures import ARCHITECTURES, MIXED
from defenses.draws import seed_draws
from defenses.frontend import FRONT_ENDED, FrontEnded
from defenses.multiresolution import SELF_ENSEMBLES
from defenses.purified import PURIFIED
from defenses.training import Plan, Recipe, Settings, train
from defenses.training.trainer import finite
from defenses.zoo.cards import clean_accuracies, halved, make_ensemble, read_card, write_model
from defenses.zoo.load import list_models, load_model, model_card
from ensemble_attacks.data import DATASETS, load_dataset
from ensemble_attacks.errors import unknown_name
from ensemble_attacks.models.ensembles import Ensemble
from ensemble_attacks.randomness import seeded
from ensemble_attacks.validation import check_choice, check_count, check_positive, check_seed

logger = logging.getLogger(__name__)
_JOINT = (standard.RECIPE, adp.RECIPE, gal.RECIPE, trs.RECIPE)
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *_JOINT,
        dverge.RECIPE,
        adversarial.RECIPE,
        adversarial.EACH,
        frontend.RECIPE,
        frontend.ROBUST,
        multiresolution.RECIPE,
        multiresolution.LIGHT_AT,
        purified.RECIPE,
        *igat.RECIPES,
        *map(with_adversarial_training, _JOINT[1:]),
        with_adversarial_training(dverge.RECIPE, each_member=True),
    )
}
MOST_MEMBERS = 1000
SEEDS = 2**40  # below which every epoch has seeds of its own that PyTorch takes
BACKBONES = 3  # members of the ensemble that the backbones behind front ends are taken from
DEFAULT_ARCHITECTURE = {"digits": "convnet", "cifar10": "resnet20", "cifar100": "resnet20"}
SETTINGS = {
    "digits": Settings(pad=1, flip=False, eps=0.1, distillation_eps=0.2),
    "cifar10": Settings(pad=4, flip=True, eps=8 / 255, distillation_eps=0.07),
    "cifar100": Settings(pad=4, flip=True, eps=8 / 255, distillation_eps=0.07),
}
USUAL_CLASSES = 10  # of a network that is not told how many


def train_model(
    recipe: str,
    *,
    dataset: str = "digits",
    architecture: str | None = None,
    members: int = 3,
    epochs: int = 30,
    batch_size: int = 128,
    seed: int = 0,
    data_dir: str | Path = "data",
    out: str | Path,
    model_dir: str | Path | None = None,
    start_from: str | None = None,
    max_lr: float | None = None,
    device: str | torch.device = "cpu",
    amp: bool = False,
    minutes: float | None = None,
    download: bool = False,
) -> Path:
    """Train a defense and put its weights and card where ``load_model(..., model_dir=model_dir)`` finds them.

    It resumes from the checkpoint in ``out``, if there is one.

    Args:
        recipe: the name of the recipe, a key of ``RECIPES``.
        dataset: ``"digits"``, ``"cifar10"`` or ``"cifar100"``.
        architecture: the network of every member; ``None``: ``convnet`` for digits, ``resnet20`` for CIFAR.
        members: the number of members.
        epochs: the number of epochs.
        batch_size: the number of images per step.
        seed: the seed of the initial weights and of all randomness of the training.
        data_dir: the folder that holds ``cifar-10-batches-py``, or ``cifar-100-python`` (digits need none).
        out: the folder of checkpoint and log.
        model_dir: the folder of the finished model; ``None``: ``out``.
        start_from: a model whose weights training starts from; ``None``: as the recipe has it (DVERGE starts from the
            standard ensemble of this size, iGAT from that of its defense, front ends and purifiers from the backbones of an
            ensemble of three, the others from random weights).
        max_lr: the peak of the one-cycle schedule; ``None``: the recipe's.
        device: the device to train on.
        amp: whether to run the networks in bfloat16 autocast.
        minutes: how long to train, in place of ``epochs``, with a schedule that follows the clock.
        download: whether torchvision may fetch CIFAR into ``data_dir`` where it is absent.

    Returns:
        The path of the card.

    Raises:
        TypeError, ValueError: Where an argument cannot be used, or a folder holds another run; nothing has been trained.
        FloatingPointError: Where training diverged; the last finite checkpoint stays.
    """
    if recipe not in RECIPES:
        raise unknown_name("recipe", recipe, RECIPES)
    chosen = RECIPES[recipe]
    check_choice("dataset", dataset, tuple(SETTINGS))
    check_count("members", members, at_least=chosen.fewest_members, at_most=MOST_MEMBERS)
    check_count("epochs", epochs, at_most=10**6)
    check_count("batch_size", batch_size, at_least=2)  # batch norm needs two
    check_seed(seed)
    if seed >= SEEDS:
        raise ValueError(f"seed must be below {SEEDS}, got {seed}")
    if max_lr is not None:
        check_positive("max_lr", max_lr)
        chosen = replace(chosen, max_lr=max_lr)
    if minutes is not None:
        check_positive("minutes", minutes)
    images, labels = load_dataset(dataset, "train", data_dir=data_dir, download=download)
    test_images, test_labels = load_dataset(dataset, "test", data_dir=data_dir, download=download)
    network = DEFAULT_ARCHITECTURE[dataset] if architecture is None else architecture
    built = {**FRONT_ENDED, **PURIFIED, **SELF_ENSEMBLES} if chosen.prefix else ARCHITECTURES
    fitting = [name.removeprefix(chosen.prefix) for name in built if name.startswith(chosen.prefix)] + list(MIXED)
    check_choice(f"architecture for the recipe {recipe!r}", network, fitting)
    architecture = chosen.prefix + network
    options: dict[str, Any] = {"negative_slope": chosen.negative_slope} if chosen.negative_slope else {}
    if (classes := DATASETS[dataset].classes) != USUAL_CLASSES:
        options["num_classes"] = classes
    with seeded(seed):
        ensemble = make_ensemble(architecture, members, **options)
    _check_fits(ensemble, images[:2], architecture, dataset)
    if start_from is None and chosen.start_from is not None:
        start_from = f"{chosen.start_from}_{network}_{members if chosen.prefix == '' else BACKBONES}"
    if start_from is not None:
        _start(ensemble, start_from, model_dir or out, dataset, chosen)
    stem = Path(model_dir or out) / dataset / "Linf" / f"{recipe}_{network}_{members}"
    plan = Plan(chosen, SETTINGS[dataset], epochs, batch_size, seed, start_from, amp, minutes)
    settings = plan.for_card()
    _check_free(stem, settings)
    outcome = train(plan, ensemble, images, labels, out=Path(out), device=device)
    stored = halved(ensemble.state_dict())
    if not finite(stored):
        raise FloatingPointError(
            f"{recipe!r} ended with weights beyond half precision: train again in another folder with a lower max_lr "
            f"(now {chosen.max_lr:g})"
        )
    ensemble.load_state_dict(stored)  # the accuracies are those of the weights as stored
    seed_draws(ensemble, seed)
    card = {
        "defense": chosen.summary,
        "dataset": dataset,
        "architecture": architecture,
        "members": members,
        **options,
        "training": {
            **settings,
            "epochs": round(outcome["epochs"], 2),
            "seconds": round(outcome["seconds"]),
            "hardware": hardware(device),
            "last_epoch_loss": round(outcome["loss"], 4),
        },
        "clean_accuracy": clean_accuracies(ensemble, test_images, test_labels, device),
        "weights": "float16 convolutions and linear layers, float32 batch norm",
        "license": "MIT",
    }
    return write_model(stem, ensemble, card, half=True)


@torch.no_grad()
def _check_fits(ensemble: Ensemble, images: Tensor, architecture: str, dataset: str) -> None:
    try:
        classes = ensemble.eval().member_logits(images).shape[-1]
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"architecture {architecture!r} does not take the images of {dataset}: {reason}") from None
    if classes != DATASETS[dataset].classes:
        raise ValueError(f"architecture {architecture!r} has {classes} classes, {dataset} has {DATASETS[dataset].classes}")


def _check_free(stem: Path, settings: dict[str, Any]) -> None:
    """Raise a `ValueError` if there is a model of this name that was trained otherwise."""
    if stem.with_suffix(".json").exists():
        found = read_card(stem).get("training", {})
        differ = [key for key in settings if found.get(key) != settings[key]]
        if differ:
            raise ValueError(
                f"model_dir holds {str(stem)!r}, trained with other {', '.join(differ)}: choose another folder, or remove it"
            )


def _start(ensemble: Any, name: str, model_dir: str | Path, dataset: str, recipe: Recipe) -> None:
    """Give ``ensemble``, or the backbones behind its front ends, the weights of the model ``name``.

    Raises:
        ValueError: Where there is no such model, or its weights do not fit.
    """
    if name not in list_models(dataset, model_dir):
        raise ValueError(f"{unknown_name(f'model for {dataset}', name, list_models(dataset, model_dir))}; train it first")
    start = load_model(name, model_dir, dataset)
    card = model_card(name, model_dir, dataset)
    fits = "normalization" not in card
    backbones = [member.backbone for member in getattr(ensemble, "members", ()) if isinstance(member, FrontEnded)]
    pairs = list(zip(backbones, getattr(start, "members", ()), strict=False)) if backbones else [(ensemble, start)]
    fits &= len(pairs) >= len(backbones) and all(
        {key: value.shape for key, value in to.state_dict().items()}
        == {key: value.shape for key, value in source.state_dict().items()}
        for to, source in pairs
    )
    if not fits:
        raise ValueError(
            f"start_from {name!r} has other members than the ensemble to train: choose one of the same architecture, number "
            "of members and normalisation"
        )
    if (slope := card.get("negative_slope", 0.0)) != recipe.negative_slope:
        differ = (
            f"start_from {name!r} has activations of negative_slope {slope:g}, {recipe.name!r} {recipe.negative_slope:g}"
        )
        if backbones:  # which stay as they are
            raise ValueError(f"{differ}: choose a start with the same")
        logger.warning("%s: its weights are taken, its activations are not", differ)
    for to, source in pairs:
        to.load_state_dict(source.state_dict())


def hardware(device: str | torch.device) -> str:
    """Return the name of what the training ran on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"
