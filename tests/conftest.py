"""Models and data that tests share: small enough to be quick, real enough to mean something."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from defenses import load_model
from ensemble_attacks import Ensemble
from ensemble_attacks.data import load_dataset
from tests.helpers import make_ensemble

torch.set_num_threads(1)  # the models are tiny, and threads that wait for each other cost more than they bring


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """64 random 3x6x6 images in float64, with the labels that the softmax ensemble gives them."""
    images = torch.rand(64, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return images, make_ensemble()(images).argmax(1)


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    return load_dataset("digits", n=100)


@pytest.fixture
def digits_model(request: pytest.FixtureRequest) -> Ensemble:
    return load_model("adp_convnet_3", dataset="digits", vote=request.param)


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """The folder of CIFAR-10; skips where there is none."""
    folder = Path(os.environ.get("ENSEMBLE_ATTACKS_DATA", "data"))
    if not (folder / "cifar-10-batches-py").is_dir():
        pytest.skip(f"no CIFAR-10 in {folder}: set ENSEMBLE_ATTACKS_DATA to the folder that holds cifar-10-batches-py")
    return folder
