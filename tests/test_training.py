"""Training: one command, resumable, with the same result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from defenses import load_model, train_model
from defenses.standard import RECIPE
from defenses.training import train
from defenses.training.trainer import augment
from defenses.zoo import make_ensemble
from ensemble_attacks.data import load_dataset


class Killed(Exception):
    """The process dies here."""


def run(out: Path, epochs: int, die_after: int | None = None) -> dict[str, Tensor]:
    images, labels = load_dataset("digits", "train", n=300)
    torch.manual_seed(0)
    ensemble = make_ensemble("convnet", 2)
    steps = 0

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        if die_after is not None and steps > die_after:
            raise Killed
        return RECIPE.loss(logits, y)

    train(replace(RECIPE, loss=loss), ensemble, images, labels, out=out, epochs=epochs, batch_size=100, pad=1, flip=False)
    return ensemble.state_dict()


def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", epochs=4)
    with pytest.raises(Killed):
        run(tmp_path / "killed", epochs=4, die_after=8)  # in the middle of the third epoch
    resumed = run(tmp_path / "killed", epochs=4)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert len((tmp_path / "killed" / "train.log").read_text().splitlines()) == 4


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    arguments = dict(dataset="digits", members=2, epochs=1, out=tmp_path)
    card = train_model("standard", **arguments)
    for change in ({"seed": 5}, {"epochs": 2}, {"members": 3}, {"batch_size": 64}):
        with pytest.raises(ValueError, match="holds a run with other"):
            train_model("standard", **{**arguments, **change})
    with pytest.raises(ValueError, match="other recipe"):
        train_model("adp", **arguments)
    before = card.read_bytes()
    train_model("standard", **arguments)
    assert card.read_bytes() == before


def test_train_model_ends_where_load_model_looks(tmp_path: Path) -> None:
    card = train_model("adp", dataset="digits", members=2, epochs=1, out=tmp_path / "run", model_dir=tmp_path / "models")
    assert card.name == "adp_convnet_2.json"
    model = load_model("adp_convnet_2", tmp_path / "models", "digits", vote="voting")
    assert len(model.members) == 2


def test_a_diverging_run_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    images, labels = load_dataset("digits", "train", n=200)
    steps = iter(range(100))
    broken = replace(RECIPE, loss=lambda logits, y: RECIPE.loss(logits, y) * (torch.nan if next(steps) >= 3 else 1))
    with pytest.raises(FloatingPointError, match="became nan in epoch 2"):
        train(broken, make_ensemble("convnet", 2), images, labels, out=tmp_path, epochs=3, batch_size=100, pad=1, flip=False)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in kept["ensemble"].values())


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'adp'"):
        train_model("apd", out=tmp_path / "x")
    with pytest.raises(ValueError, match="members must be at least 2"):
        train_model("adp", members=1, out=tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        train_model("adp", dataset="cifar10", data_dir=tmp_path, out=tmp_path / "x")
    with pytest.raises(ValueError, match="unknown architecture"):
        train_model("adp", architecture="resnet", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_augmentation_shifts_and_mirrors() -> None:
    images = torch.arange(2 * 1 * 3 * 3, dtype=torch.float32).view(2, 1, 3, 3)
    generator = torch.Generator().manual_seed(0)
    seen = [augment(images, pad=0, flip=True, generator=generator)[1, 0] for _ in range(20)]
    assert {tuple(image[0].tolist()) for image in seen} == {(9.0, 10.0, 11.0), (11.0, 10.0, 9.0)}
    shifted = augment(images, pad=1, flip=False, generator=generator)
    assert shifted.shape == images.shape
    assert set(shifted.flatten().tolist()) <= set(images.flatten().tolist()) | {0.0}
