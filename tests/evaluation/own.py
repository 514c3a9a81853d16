"""A folder that is nobody's project: networks in a file with a neighbour, and images in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

NETS = '''
"""Somebody's networks."""
import torch
from torch import nn

from ensemble_attacks import Ensemble
from widths import WIDTH


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x):
        return self.body(x)


def make(members=3, vote="voting"):
    return Ensemble([Net(WIDTH) for _ in range(members)], vote=vote)


def single(width=4):
    return Net(width), {"dataset": "images.npz"}


class Summed(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(Net(4) for _ in range(2))

    def forward(self, x):
        return sum(net(x) for net in self.nets)


def adopted():
    return Summed(), {"members": ["nets.0", "nets.1"], "vote": "logits"}


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(10, 3, 4, 4, generator=generator), torch.arange(10) % 3


def dataset():
    return torch.utils.data.TensorDataset(*images())


def raises():
    raise KeyError("no such thing")


def gpu():
    raise RuntimeError("Found no NVIDIA driver on your system")


def nothing():
    return [1, 2]


def misspelt():
    return Net(4), {"member": ["body"]}


def needs(width):
    return Net(width)
'''


def write_folder(folder: Path) -> Path:
    """Write ``nets.py``, its neighbour ``widths.py``, and ``images.npz`` into a folder; return it."""
    folder.mkdir(exist_ok=True)
    (folder / "nets.py").write_text(NETS)
    (folder / "widths.py").write_text("WIDTH = 5\n")
    images, labels = a_batch()
    np.savez(folder / "images.npz", images=images.numpy(), labels=labels.numpy())
    return folder


def a_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``images`` of the file returns."""
    images = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(10) % 3
