"""List the datasets that are known by name, and read them: digits (the offline default), and torchvision's, from its files.

Another package registers a dataset as an entry point of the group ``ensemble_attacks.data``: a name, and a `Dataset`, or a
function that returns what `from_python` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GROUP = "ensemble_attacks.data"
Split = tuple[Any, Tensor]  # images: a tensor, or what reads them (`opened.Images`)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A record of what is known of a dataset.

    Attributes:
        read: the function (split, folder, download) -> images (N, ...) of whole numbers, and labels (N,).
        scale: the largest of these numbers.
        classes: the number of classes.
        shape: the shape of an image; ``None`` where it depends on the transform.
        test_images: the number of test images.
    """

    read: Callable[[str, Path, bool], Split]
    scale: int
    classes: int
    shape: tuple[int, ...] | None
    test_images: int


def registered(name: str) -> Any:
    """Return what another package registers under a name: a `Dataset`, or a function; ``None`` where nobody does."""
    return next((entry.load() for entry in entry_points(group=GROUP) if entry.name == name), None)


def known_datasets() -> list[str]:
    """Return the names of all datasets, also of those that other packages register."""
    return sorted({*DATASETS, *(entry.name for entry in entry_points(group=GROUP))})


DIGITS = Path(__file__).with_name("digits.npz")  # scikit-learn's, the training images first; see digits.LICENSE
DIGITS_TRAIN = 1200


@lru_cache(maxsize=2)
def _digits(split: str, data_dir: Path, download: bool) -> Split:
    part = slice(None, DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    with np.load(DIGITS) as stored:
        images, labels = stored["images"][part], stored["labels"][part]
    return torch.tensor(images).unsqueeze(1), torch.tensor(labels, dtype=torch.int64)


@lru_cache(maxsize=2)
def _torchvision(kind: str, called: str, files: str, split: str, data_dir: Path, download: bool) -> Split:
    """Read a dataset of torchvision's, of class ``kind``, whose ``files`` (a folder or file) lie in ``data_dir``."""
    from torchvision import datasets

    if not download and not (data_dir / files).exists():
        which = "folder" if "." not in files else "file"
        raise FileNotFoundError(
            f"no {which} {files!r} in data_dir {str(data_dir)!r}: name the folder that holds it "
            "(--data-dir DIR), or let torchvision fetch it (--download)"
        )
    which_split = {"split": split} if kind == "SVHN" else {"train": split == "train"}
    try:
        found = getattr(datasets, kind)(str(data_dir), download=download, **which_split)
    except RuntimeError as error:  # torchvision: "Dataset not found or corrupted"
        raise FileNotFoundError(
            f"the {called} files in {str(data_dir / files)!r} are missing or fail their checksums; "
            "fetch them again (--download)"
        ) from error
    images = torch.as_tensor(found.data)
    if images.dim() == 3:  # grey
        images = images.unsqueeze(1)
    elif kind != "SVHN":
        images = images.permute(0, 3, 1, 2)
    labels = found.labels if kind == "SVHN" else found.targets
    return images.contiguous(), torch.as_tensor(labels).long()


def _imagenet(split: str, data_dir: Path, download: bool) -> Any:
    """Read ImageNet as folders of JPEGs: ``data_dir``/imagenet/val, ``data_dir``/val, or ``data_dir`` itself."""
    from ensemble_attacks.data.folders import open_folder

    part = "train" if split == "train" else "val"
    places = (data_dir / "imagenet" / part, data_dir / part, data_dir)
    images, labels, classes = open_folder(next((place for place in places if place.is_dir()), data_dir))
    if classes != 1000:
        raise FileNotFoundError(
            f"{data_dir} holds {classes} folders of images, ImageNet 1000: name the one that holds val (--data-dir DIR), "
            "or put a classes.txt beside them, which lists the 1000 folders in order"
        )
    return images, labels


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(_digits, 16, 10, (1, 8, 8), 597),
    "cifar10": Dataset(partial(_torchvision, "CIFAR10", "CIFAR-10", "cifar-10-batches-py"), 255, 10, (3, 32, 32), 10_000),
    "cifar100": Dataset(partial(_torchvision, "CIFAR100", "CIFAR-100", "cifar-100-python"), 255, 100, (3, 32, 32), 10_000),
    "svhn": Dataset(partial(_torchvision, "SVHN", "SVHN", "test_32x32.mat"), 255, 10, (3, 32, 32), 26_032),
    "mnist": Dataset(partial(_torchvision, "MNIST", "MNIST", "MNIST"), 255, 10, (1, 28, 28), 10_000),
    "imagenet": Dataset(_imagenet, 255, 1000, None, 50_000),
}
