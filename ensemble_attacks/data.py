"""Load images and labels: scikit-learn's bundled digits (the offline default) and the official CIFAR-10.

Both come as ``(images, labels)``: float32 (N, C, H, W) in [0, 1] and int64 (N,). Normalisation belongs to the models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ensemble_attacks.errors import unknown_name

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A record of what is known of a dataset.

    Attributes:
        read: the function (split, folder, download) -> images (N, ...) of whole numbers, and labels (N,).
        scale: the largest of these numbers.
        classes: the number of classes.
        shape: the shape of an image.
        test_images: the number of test images.
    """

    read: Callable[[str, Path, bool], Split]
    scale: int
    classes: int
    shape: tuple[int, ...]
    test_images: int


def load_dataset(
    name: str,
    split: str = "test",
    *,
    data_dir: str | Path = "data",
    n: int | None = None,
    first: int = 0,
    download: bool = False,
) -> tuple[Tensor, Tensor]:
    """Load ``n`` examples of a split, in file order.

    Args:
        name: ``"digits"`` (1,797 8x8 images; 1,200 to train, 597 to test) or ``"cifar10"``.
        split: ``"train"`` or ``"test"``.
        data_dir: the folder that holds ``cifar-10-batches-py`` (digits need none).
        n: how many examples; ``None`` is all of them.
        first: the number of the first example, counted from 0.
        download: whether torchvision may fetch CIFAR-10 into ``data_dir`` where it is absent.

    Returns:
        Images, float32 (N, C, H, W) in [0, 1], and labels, int64 (N,).

    Raises:
        ValueError: Where the name or split is unknown, or the split cannot give ``n`` examples.
        FileNotFoundError: Where there is no CIFAR-10 under ``data_dir``.

    >>> images, labels = load_dataset("digits", n=4)
    >>> images.shape, labels.dtype
    (torch.Size([4, 1, 8, 8]), torch.int64)
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if name not in DATASETS:
        raise unknown_name("dataset", name, DATASETS)
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if first < 0:
        raise ValueError(f"first must be at least 0, got {first}")
    dataset = DATASETS[name]
    images, labels = dataset.read(split, Path(data_dir).resolve(), download)
    if n is not None and first + n > len(images):
        which = "images" if not first else f"images, {len(images) - first} from number {first} on"
        raise ValueError(f"n is {n}, but the {split} split of {name} has {len(images)} {which}: ask for at most that many")
    part = slice(first, None if n is None else first + n)
    return images[part].float() / dataset.scale, labels[part].clone()


@lru_cache(maxsize=2)
def _digits(split: str, data_dir: Path, download: bool) -> Split:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, train_size=1200, random_state=0, stratify=labels)
    images, labels = (train_x, train_y) if split == "train" else (test_x, test_y)
    return torch.tensor(images, dtype=torch.uint8).view(-1, 1, 8, 8), torch.tensor(labels, dtype=torch.int64)


@lru_cache(maxsize=2)
def _cifar10(split: str, data_dir: Path, download: bool) -> Split:
    from torchvision.datasets import CIFAR10

    if not download and not (data_dir / CIFAR10.base_folder).is_dir():
        raise FileNotFoundError(
            f"no folder {CIFAR10.base_folder!r} in data_dir {str(data_dir)!r}: name the folder that holds it "
            "(--data-dir DIR), or let torchvision fetch it (--download)"
        )
    try:
        dataset = CIFAR10(str(data_dir), train=split == "train", download=download)
    except RuntimeError as error:  # torchvision: "Dataset not found or corrupted"
        raise FileNotFoundError(
            f"the CIFAR-10 files in {str(data_dir / CIFAR10.base_folder)!r} are missing or fail their checksums; "
            "fetch them again (--download)"
        ) from error
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(dataset.targets, dtype=torch.int64)


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(_digits, 16, 10, (1, 8, 8), 597),
    "cifar10": Dataset(_cifar10, 255, 10, (3, 32, 32), 10_000),
}
