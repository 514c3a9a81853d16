"""Training: one command, resumable, with the same result."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from defenses import load_model, train_model
from defenses.draws import seed_draws
from defenses.recipes import RECIPES, SETTINGS, _check_fits
from defenses.standard import RECIPE
from defenses.training import Batch, Plan, train
from defenses.training.trainer import augment
from defenses.zoo.cards import make_ensemble
from ensemble_attacks.data import load_dataset
from tests.helpers import slow_but


class Killed(Exception):
    """The process dies here."""


def run(out: Path, epochs: int, die_after: int | None = None) -> dict[str, Tensor]:
    images, labels = load_dataset("digits", "train", n=300)
    torch.manual_seed(0)
    ensemble = make_ensemble("convnet", 2)
    steps = 0

    def loss(batch: Batch) -> Tensor:
        nonlocal steps
        steps += 1
        if die_after is not None and steps > die_after:
            raise Killed
        return RECIPE.loss(batch)

    recipe = replace(RECIPE, loss=loss)
    plan = Plan(recipe, SETTINGS["digits"], epochs, batch_size=100)
    train(plan, ensemble, images, labels, out=out)
    return ensemble.state_dict()


def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", epochs=4)
    with pytest.raises(Killed):
        run(tmp_path / "killed", epochs=4, die_after=8)  # in the middle of the third epoch
    resumed = run(tmp_path / "killed", epochs=4)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert len((tmp_path / "killed" / "train.log").read_text().splitlines()) == 4


@pytest.mark.slow
def test_a_run_that_was_shot_ends_with_the_same_weights(tmp_path: Path) -> None:
    """The real thing: ``kill -9`` of the command, and the same command again."""

    def command(name: str) -> list[str]:
        options = ["--dataset", "digits", "--members", "2", "--epochs", "8", "--out", str(tmp_path / name)]
        return [str(Path(sys.executable).with_name("ensemble-attacks")), "train", "standard", *options]

    quiet: dict[str, Any] = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run(command("whole"), check=True, **quiet)
    log = tmp_path / "shot" / "train.log"
    with subprocess.Popen(command("shot"), **quiet) as process:
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 2):
            time.sleep(0.01)
        process.kill()
    assert len(log.read_text().splitlines()) < 8
    assert not list((tmp_path / "shot").glob("digits/**/*.json"))
    subprocess.run(command("shot"), check=True, **quiet)
    shas = [json.loads(next((tmp_path / name).glob("digits/**/*.json")).read_text())["sha256"] for name in ("whole", "shot")]
    assert shas[0] == shas[1]


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    arguments: dict[str, Any] = dict(dataset="digits", members=2, epochs=1, out=tmp_path)
    card = train_model("standard", **arguments)
    for change in ({"seed": 5}, {"epochs": 2}, {"members": 3}, {"batch_size": 64}, {"max_lr": 0.01}):
        with pytest.raises(ValueError, match="holds a run with other"):
            train_model("standard", model_dir=tmp_path / "elsewhere", **{**arguments, **change})
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
    broken = replace(RECIPE, loss=lambda batch: RECIPE.loss(batch) * (torch.nan if next(steps) >= 3 else 1))
    ensemble, plan = make_ensemble("convnet", 2), Plan(broken, SETTINGS["digits"], epochs=3, batch_size=100)
    with pytest.raises(FloatingPointError, match=r"diverged in epoch 2, its loss became nan.*after epoch 1 are kept"):
        train(plan, ensemble, images, labels, out=tmp_path)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in kept["ensemble"].values())


ONE_PRECISION = {(name, index % 2 == 1) for index, name in enumerate(RECIPES)}  # every recipe in one; the other with -m slow


@pytest.mark.parametrize(("name", "amp"), slow_but(ONE_PRECISION, product(RECIPES, (False, True))))
def test_every_recipe_trains_reproducibly(name: str, amp: bool) -> None:
    images, labels = load_dataset("digits", "train", n=16)

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        options: dict[str, Any] = {"negative_slope": RECIPES[name].negative_slope} if RECIPES[name].negative_slope else {}
        ensemble = make_ensemble(f"{RECIPES[name].prefix}convnet", 3, **options)
        seed_draws(ensemble, 0)
        generator = torch.Generator().manual_seed(0)
        batch = Batch(ensemble, images[:8], labels[:8], lambda: images[8:], generator, 1, SETTINGS["digits"], amp)
        loss = RECIPES[name].loss(batch)
        loss.backward()
        assert loss.dtype == torch.float32
        assert ensemble.training
        return [p.grad for p in ensemble.parameters() if p.requires_grad]

    first = gradients()
    assert all(torch.isfinite(g).all() for g in first)
    moved = sum(bool(g.any()) for g in first)
    assert moved == (
        3 if name.startswith("frontend") else len(first)
    )  # its last convolutions, zero, let nothing through yet
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_training_starts_from_a_model(tmp_path: Path) -> None:
    arguments: dict[str, Any] = dict(dataset="digits", members=2, epochs=1, model_dir=tmp_path / "models")
    with pytest.raises(ValueError, match=r"unknown model for digits 'standard_convnet_2'.*train it first"):
        train_model("dverge", out=tmp_path / "dverge", **arguments)
    with pytest.raises(ValueError, match="has other members"):
        train_model("gal", start_from="standard_convnet_3", out=tmp_path / "gal", **arguments)
    assert not list(tmp_path.iterdir())
    train_model("standard", out=tmp_path / "standard", **arguments)
    card = train_model("dverge", max_lr=1e-6, out=tmp_path / "dverge", **arguments)
    assert json.loads(card.read_text())["training"]["start_from"] == "standard_convnet_2"
    ours, theirs = (load_model(f"{name}_convnet_2", tmp_path / "models", "digits") for name in ("dverge", "standard"))
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'adp'"):
        train_model("apd", out=tmp_path / "x")
    with pytest.raises(ValueError, match="members must be at least 2"):
        train_model("adp", members=1, out=tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        train_model("adp", dataset="cifar10", data_dir=tmp_path, out=tmp_path / "x")
    with pytest.raises(ValueError, match="unknown architecture"):
        train_model("adp", architecture="resnet", out=tmp_path / "x")
    with pytest.raises(ValueError, match="'convnet' does not take the images of cifar10"):
        _check_fits(make_ensemble("convnet", 2), torch.rand(2, 3, 32, 32), "convnet", "cifar10")
    with pytest.raises(ValueError, match="batch_size is 2000, but there are 1200 images"):
        train_model("adp", batch_size=2000, out=tmp_path / "x")
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        train_model("adp", batch_size=1, out=tmp_path / "x")
    with pytest.raises(TypeError, match="seed must be a whole number"):
        train_model("adp", seed=1.5, out=tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be below"):
        train_model("adp", seed=2**62, out=tmp_path / "x")
    with pytest.raises(ValueError, match="unknown architecture for the recipe 'gal' 'multiresolution-convnet'"):
        train_model("gal", architecture="multiresolution-convnet", out=tmp_path / "x")
    with pytest.raises(ValueError, match=r"recipe 'multiresolution' 'resnet20b': did you mean 'resnet20'"):
        train_model("multiresolution", members=1, architecture="resnet20b", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"xyz", {"state_dict": {}}])
def test_a_checkpoint_that_is_none(content: object, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / "checkpoint.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.pt' (cannot be read|is no checkpoint).*remove it"):
        train_model("standard", members=2, epochs=1, out=tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_weights_beyond_half_precision_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"beyond half precision.*lower max_lr"):
        train_model("adp", members=2, epochs=1, max_lr=1e5, out=tmp_path)
    assert not (tmp_path / "digits").exists()


def test_a_frozen_backbone_keeps_its_slope(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"negative_slope 0\.1, 'frontend' 0: choose a start with the same"):
        train_model("frontend", start_from="gal_convnet_3", epochs=1, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_model_trained_otherwise_is_not_overwritten(tmp_path: Path) -> None:
    arguments: dict[str, Any] = dict(dataset="digits", members=2, epochs=1, model_dir=tmp_path / "models")
    card = train_model("standard", out=tmp_path / "first", **arguments)
    before = card.read_bytes()
    with pytest.raises(ValueError, match="trained with other seed"):
        train_model("standard", seed=1, out=tmp_path / "second", **arguments)
    assert card.read_bytes() == before
    assert not (tmp_path / "second").exists()


def test_augmentation_shifts_and_mirrors() -> None:
    images = torch.arange(2 * 1 * 3 * 3, dtype=torch.float32).view(2, 1, 3, 3)
    generator = torch.Generator().manual_seed(0)
    seen = [augment(images, pad=0, flip=True, generator=generator)[1, 0] for _ in range(20)]
    assert {tuple(image[0].tolist()) for image in seen} == {(9.0, 10.0, 11.0), (11.0, 10.0, 9.0)}
    shifted = augment(images, pad=1, flip=False, generator=generator)
    assert shifted.shape == images.shape
    assert set(shifted.flatten().tolist()) <= set(images.flatten().tolist()) | {0.0}


@pytest.mark.slow
def test_random_models_train_reproducibly(tmp_path: Path) -> None:
    """Their draws are part of the run."""
    cards = [
        train_model("multiresolution", members=1, epochs=1, out=tmp_path / name, model_dir=tmp_path / name)
        for name in ("first", "second", "first")  # the last only judges again
    ]
    first, second = (json.loads(card.read_text()) for card in cards[1:])
    assert first["sha256"] == second["sha256"]
    assert first["clean_accuracy"] == second["clean_accuracy"]
    assert load_model(cards[0].stem, tmp_path / "first", "digits").member_logits(torch.rand(2, 1, 8, 8)).shape == (4, 2, 10)


def test_a_front_end_leaves_its_backbone_alone(tmp_path: Path) -> None:
    card = train_model("frontend", members=1, epochs=1, max_lr=1e-3, out=tmp_path, model_dir=tmp_path)
    model = load_model(card.stem, tmp_path, "digits").members[0]
    backbone = load_model("standard_convnet_3", dataset="digits")
    assert card.stem == "frontend_convnet_1"
    state = backbone.members[0].state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.backbone.state_dict().items())
    assert model.frontend.residual[-1].weight.any()
    with pytest.raises(ValueError, match="members must be at least 2, got 1"):
        train_model("gal", members=1, out=tmp_path / "gal")
