"""The models that ship, and the way a newly trained one gets beside them.

A model is two files, ``<dataset>/<threat model>/<name>.safetensors`` and its card, ``<name>.json``: recipe, seed, epochs,
time, hardware, clean accuracy, and the sha256 that the weights must have.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from defenses import adp, standard
from defenses.architectures import ARCHITECTURES
from defenses.training import Recipe, train
from ensemble_attacks.data import DATASETS, load_dataset
from ensemble_attacks.ensembles import VOTES, Ensemble, check_vote
from ensemble_attacks.errors import WeightsError, unknown_name
from ensemble_attacks.validation import check_count

SHIPPED = Path(__file__).parent / "weights"
RECIPES: dict[str, Recipe] = {module.RECIPE.name: module.RECIPE for module in (standard, adp)}
THREAT_MODELS = ("Linf",)
DEFAULT_ARCHITECTURE = {"digits": "convnet", "cifar10": "resnet20"}
AUGMENTATION: dict[str, dict[str, Any]] = {"digits": {"pad": 1, "flip": False}, "cifar10": {"pad": 4, "flip": True}}


def list_models(dataset: str | None = None, model_dir: str | Path | None = None) -> list[str]:
    """Names of the models that can be loaded, ``<defense>_<architecture>_<members>``, of one dataset or of all.

    >>> "adp_convnet_3" in list_models("digits")
    True
    """
    if dataset is not None and dataset not in DATASETS:
        raise unknown_name("dataset", dataset, DATASETS)
    return sorted({card.stem for folder in _folders(model_dir) for card in folder.glob(f"{dataset or '*'}/*/*.json")})


def _folders(model_dir: str | Path | None) -> list[Path]:
    """Where models are looked for, in this order."""
    return [Path(model_dir), SHIPPED] if model_dir else [SHIPPED]


def load_model(
    model_name: str,
    model_dir: str | Path | None = None,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    *,
    vote: str = "softmax",
) -> Ensemble:
    """Load a trained ensemble defense; RobustBench's signature, and the vote.

    Args:
        model_name: one of ``list_models(dataset)``.
        model_dir: a folder that holds ``<dataset>/<threat model>/<name>.safetensors``; the models that ship come after it.
        dataset, threat_model: names, or RobustBench's enums.
        vote: ``"softmax"``, ``"voting"`` or ``"logits"``.

    Returns:
        The ensemble, in eval mode.

    Raises:
        ValueError: an unknown model, dataset, threat model or vote; names the nearest known one.
        WeightsError: the file is not the one that the card describes.
    """
    dataset, threat_model = (str(getattr(value, "value", value)) for value in (dataset, threat_model))
    if dataset not in DATASETS:
        raise unknown_name("dataset", dataset, DATASETS)
    if threat_model not in THREAT_MODELS:
        raise unknown_name("threat model", threat_model, THREAT_MODELS)
    check_vote(vote)
    stems = [folder / dataset / threat_model / model_name for folder in _folders(model_dir)]
    stem = next((stem for stem in stems if stem.with_suffix(".json").exists()), None)
    if stem is None:
        raise unknown_name(f"model for {dataset}", model_name, list_models(dataset, model_dir))
    card = json.loads(stem.with_suffix(".json").read_text())
    ensemble = make_ensemble(card["architecture"], card["members"], vote)
    try:
        ensemble.load_state_dict(read_weights(stem.with_suffix(".safetensors"), card["sha256"]))
    except RuntimeError as error:
        raise WeightsError(f"{stem}.safetensors does not fit {card['architecture']} x {card['members']}: {error}") from None
    return ensemble.eval()


def make_ensemble(architecture: str, members: int, vote: str = "softmax") -> Ensemble:
    """An untrained ensemble of equal members."""
    if architecture not in ARCHITECTURES:
        raise unknown_name("architecture", architecture, ARCHITECTURES)
    return Ensemble([ARCHITECTURES[architecture]() for _ in range(members)], vote)


def read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, in float32, after checking its digest."""
    if not path.exists():
        raise WeightsError(
            f"the weights {path} are missing: install the package again, or train them (ensemble-attacks train)"
        )
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise WeightsError(f"the weights {path} have sha256 {found}, the card says {sha256}: fetch or train them again")
    return {key: value.float() if value.is_floating_point() else value for key, value in load_safetensors(content).items()}


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
    device: str | torch.device = "cpu",
    amp: bool = False,
) -> Path:
    """Train a defense and put its weights and card where ``load_model(..., model_dir=model_dir)`` finds them.

    Resumes from the checkpoint in ``out``, if there is one. ``model_dir`` defaults to ``out``.

    Returns:
        The path of the card.
    """
    if recipe not in RECIPES:
        raise unknown_name("recipe", recipe, RECIPES)
    check_count("members", members, at_least=2)
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    images, labels = load_dataset(dataset, "train", data_dir=data_dir)
    test_images, test_labels = load_dataset(dataset, "test", data_dir=data_dir)
    architecture = architecture or DEFAULT_ARCHITECTURE[dataset]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ensemble = make_ensemble(architecture, members)
    outcome = train(
        RECIPES[recipe],
        ensemble,
        images,
        labels,
        out=Path(out),
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        device=device,
        amp=amp,
        **AUGMENTATION[dataset],
    )
    stem = Path(model_dir or out) / dataset / "Linf" / f"{recipe}_{architecture}_{members}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    sha256 = write_weights(ensemble, stem.with_suffix(".safetensors"))
    ensemble.load_state_dict(read_weights(stem.with_suffix(".safetensors"), sha256))
    card = {
        "name": stem.name,
        "defense": RECIPES[recipe].summary,
        "dataset": dataset,
        "architecture": architecture,
        "members": members,
        "training": {
            "recipe": recipe,
            "max_lr": RECIPES[recipe].max_lr,
            "schedule": "one cycle, peak at 30%",
            "epochs": epochs,
            "batch_size": batch_size,
            "seed": seed,
            "precision": "bfloat16 autocast" if amp else "float32",
            "augmentation": AUGMENTATION[dataset],
            "seconds": round(outcome["seconds"]),
            "hardware": hardware(device),
            "last_epoch_loss": round(outcome["loss"], 4),
        },
        "clean_accuracy": clean_accuracies(ensemble, test_images, test_labels, device),
        "weights": "float16 convolutions and linear layers, float32 batch norm",
        "sha256": sha256,
        "license": "MIT",
    }
    path = stem.with_suffix(".json")
    path.with_suffix(".tmp").write_text(json.dumps(card, indent=2) + "\n")
    os.replace(path.with_suffix(".tmp"), path)
    return path


def write_weights(ensemble: Ensemble, path: Path) -> str:
    """Store the weights, convolutions and linear layers in half precision; returns the sha256."""
    state = {
        key: (value.half() if value.is_floating_point() and value.dim() > 1 else value).detach().cpu().contiguous()
        for key, value in ensemble.state_dict().items()
    }
    content = save_safetensors(state)
    path.with_suffix(".tmp").write_bytes(content)
    os.replace(path.with_suffix(".tmp"), path)
    return hashlib.sha256(content).hexdigest()


@torch.no_grad()
def clean_accuracies(ensemble: Ensemble, images: Tensor, labels: Tensor, device: str | torch.device) -> dict[str, Any]:
    """Accuracy on the test set, in percent, of each member and of each vote."""
    ensemble.eval()
    batches = [ensemble.member_logits(batch.to(device)).cpu() for batch in images.split(500)]
    logits_MNK = torch.cat(batches, dim=1)
    percent = lambda predicted: round(100 * (predicted == labels).double().mean().item(), 2)  # noqa: E731
    return {
        "n": len(labels),
        "members": [percent(logits_NK.argmax(1)) for logits_NK in logits_MNK],
        **{vote: percent(aggregate(logits_MNK).argmax(1)) for vote, aggregate in VOTES.items()},
    }


def hardware(device: str | torch.device) -> str:
    """What the training ran on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"
