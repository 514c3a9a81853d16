"""Recipes train on CIFAR-100 as it is published, wherever it lies."""

from __future__ import annotations

import json
import pickle
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import CIFAR100

from defenses import load_model, train_model
from ensemble_attacks import MORA, judge
from ensemble_attacks.data import load_dataset
from tests.helpers import slow_but


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a few images in the official format, whose checksums are those that torchvision expects."""
    files = tmp_path / "cifar-100-python"
    files.mkdir()
    generator = np.random.default_rng(0)
    contents: dict[str, dict[str, Any]] = {
        name: {
            "data": generator.integers(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": generator.integers(0, 100, count).tolist(),
        }
        for name, count in (("train", 24), ("test", 8))
    }
    contents["meta"] = {"fine_label_names": [f"class {index}" for index in range(100)]}
    sums = {}
    for name, content in contents.items():
        written = pickle.dumps(content)
        (files / name).write_bytes(written)
        sums[name] = md5(written).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]})
    return tmp_path


def test_a_recipe_trains_on_cifar100_and_its_model_is_attacked(folder: Path, tmp_path: Path) -> None:
    card = train_model("adp", dataset="cifar100", members=2, epochs=1, batch_size=12, data_dir=folder, out=tmp_path / "run")
    said = json.loads(card.read_text())
    assert (said["dataset"], said["architecture"], said["num_classes"]) == ("cifar100", "resnet20", 100)
    assert said["clean_accuracy"]["n"] == 8
    model = load_model("adp_resnet20_2", tmp_path / "run", "cifar100")
    x, y = load_dataset("cifar100", data_dir=folder, n=4)
    assert model(x).shape == (4, 100)
    images = MORA(model, eps=0.01, steps=1)(x, y)
    assert judge(model, x, y, images, eps=0.01).summary()["n"] == 4


@pytest.mark.parametrize(
    ("recipe", "network", "start"),
    slow_but(
        [("purified", "resnet20", "standard")],
        [("frontend", "resnet20", "standard"), ("purified", "resnet20", "standard"), ("multiresolution", "resnet18", None)],
    ),
)
def test_what_masks_gradients_trains_on_it_too(
    recipe: str, network: str, start: str | None, folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = dict(dataset="cifar100", batch_size=12, epochs=1, data_dir=folder, model_dir=tmp_path)
    if start:
        train_model(start, members=3, out=tmp_path / "start", **options)
    card = train_model(recipe, members=1, architecture=network, out=tmp_path / "run", **options)
    model = load_model(card.stem, tmp_path, "cifar100")
    assert model(load_dataset("cifar100", data_dir=folder, n=2)[0]).shape == (2, 100)
