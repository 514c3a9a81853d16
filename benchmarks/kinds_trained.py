"""Kinds of ensembles that are not made of given networks: two libraries' own, small, trained on the spot within seconds."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.kinds_given import Kind, Nets, Routine, Training

MEMBERS, EPOCHS, BATCH, RATE = 4, 8, 40, 2e-3
SIZE = 32  # pixels of what torch-uncertainty's networks are made for


class Small(nn.Module):
    """Two convolutions and a linear layer: images (N, C, H, W) -> logits (N, K)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()),
            nn.Linear(512, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def trained(model: nn.Module, data: Training, copies: int = 1, after: Callable[[int], object] = lambda epoch: None) -> Any:
    """Train a network whose answer holds rows of members: each of these learns the labels of its images.

    Args:
        model: images -> rows (M * N, K) or, of one that shares them out, (N, K).
        copies: how many batches, each in another order, go in at once.
        after: called with the number of each epoch that has ended.
    """
    generator = torch.Generator().manual_seed(data.seed)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    model.train()
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(data.x), generator=generator).split(BATCH):
            rows = torch.cat([rows[torch.randperm(len(rows), generator=generator)] for _ in range(copies)])
            scores, labels = model(data.x[rows]), data.y[rows]
            loss = F.cross_entropy(scores, labels.repeat(len(scores) // len(labels)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after(epoch)
    return model.eval()


def _shape(data: Training) -> dict[str, int]:
    return {"in_channels": data.x.shape[1], "num_classes": int(data.y.max()) + 1}


def _sized(net: nn.Module, data: Training) -> nn.Module:
    """Return the network for images of this size."""
    return net if data.x.shape[-1] >= SIZE else nn.Sequential(nn.Upsample((SIZE, SIZE)), net)


def of_networks(name: str, copies: int = 1, **settings: Any) -> Callable[[Nets, Training], nn.Module]:
    """Return what makes and trains a network of torch-uncertainty's."""

    def make(nets: Nets, data: Training) -> nn.Module:
        library = importlib.import_module("torch_uncertainty.models.classification")
        if "style" in settings:
            style = importlib.import_module("torch_uncertainty.models.classification.resnet.utils").ResNetStyle
            settings["style"] = style(settings["style"])
        return trained(_sized(getattr(library, name)(**_shape(data), **settings), data), data, copies)

    return make


def dropping(nets: Nets, data: Training) -> nn.Module:
    library = importlib.import_module("torch_uncertainty")
    net = library.models.classification.lenet(**_shape(data), dropout_rate=0.2)
    return library.methods.mc_dropout(trained(_sized(net, data), data), num_estimators=MEMBERS).eval()


def gaussian(nets: Nets, data: Training) -> nn.Module:
    """Weights drawn once from a Gaussian around the path of training."""
    library = importlib.import_module("torch_uncertainty")
    net = _sized(library.models.classification.lenet(**_shape(data)), data)
    model = library.methods.SWAG(net, cycle_start=0, cycle_length=1, num_estimators=MEMBERS)
    return trained(model, data, after=model.update_wrapper)


def fitted(name: str, **options: Any) -> Callable[[Nets, Training], nn.Module]:
    """Return what makes and fits a classifier of torchensemble's."""

    def make(nets: Nets, data: Training) -> nn.Module:
        channels, classes = _shape(data).values()
        kind = getattr(importlib.import_module("torchensemble"), name)
        settings = {"estimator_args": {"channels": channels, "classes": classes}, "n_estimators": MEMBERS, "cuda": False}
        model = kind(estimator=Small, **settings)
        model.logger = logging.getLogger("torchensemble")
        model.set_optimizer("Adam", lr=RATE)
        generator = torch.Generator().manual_seed(data.seed)
        loader = DataLoader(TensorDataset(data.x, data.y), BATCH, shuffle=True, generator=generator)
        with redirect_stdout(StringIO()):
            model.fit(loader, epochs=EPOCHS, save_model=False, **options)
        return model.eval()

    return make


resnet = partial(of_networks, arch=20, num_estimators=MEMBERS, style="cifar")
KINDS: dict[str, Kind] = {
    f"torch-uncertainty {name}": Kind(make, "as_ensemble(model)", Routine, draws)
    for name, make, draws in [
        ("Packed-Ensembles", of_networks("packed_lenet", num_estimators=MEMBERS), 1),
        ("BatchEnsemble", of_networks("batchensemble_lenet", num_estimators=MEMBERS, repeat_training_inputs=True), 1),
        ("MIMO", resnet("mimo_resnet", copies=MEMBERS, width_multiplier=0.5), 1),
        ("Masksembles", resnet("masked_resnet", scale=2.0), 1),
        ("SWAG", gaussian, 1),
        ("MC dropout", dropping, 10),
        ("Bayesian network", of_networks("bayesian_lenet", num_samples=MEMBERS), 10),
    ]
}
KINDS |= {
    f"torchensemble {name} fitted": Kind(fitted(name, **options), "as_ensemble(model)")
    for name, options in [
        ("SnapshotEnsembleClassifier", {}),
        ("FastGeometricClassifier", {"cycle": 2, "lr_1": 2e-3}),
        ("GradientBoostingClassifier", {}),
    ]
}
