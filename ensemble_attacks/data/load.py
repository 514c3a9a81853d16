"""Open a dataset by what a user calls it, and load images of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import ref

from torch import Tensor

from ensemble_attacks import sources
from ensemble_attacks.data.folders import SUFFIXES, open_folder, read_arrays
from ensemble_attacks.data.opened import Opened, from_python
from ensemble_attacks.data.records import DATASETS, Dataset, known_datasets, registered
from ensemble_attacks.data.transforms import transform_of
from ensemble_attacks.errors import unknown_name

OFFERED: dict[str, Opened] = {}  # what a Python program evaluates on, by the name that its run knows it by


def load_dataset(
    name: str,
    split: str = "test",
    *,
    data_dir: str | Path = "data",
    n: int | None = None,
    first: int = 0,
    download: bool = False,
    transform: str = "",
    rows: Sequence[int] | None = None,
    span: Sequence[float] | None = (0.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """Load ``n`` examples of a split, in file order.

    Args:
        name: ``"digits"`` (1,797 8x8 images; 1,200 to train, 597 to test), ``"cifar10"``, or anything that `open_dataset`
            opens.
        split: ``"train"`` or ``"test"``.
        data_dir: the folder that holds ``cifar-10-batches-py`` and the like (digits need none).
        n: how many examples; ``None`` is all of them.
        first: the number of the first example, counted from 0.
        download: whether torchvision may fetch the dataset into ``data_dir`` where it is absent.
        transform: what is done to every image, as ``"resize=256,crop=224"``.
        rows: the numbers of the examples to choose from, in place of all.
        span: what the least and the largest whole number, such as 0 and 255, stand for; ``None``: for nothing.

    Returns:
        Images, float32 (N, C, H, W) in [0, 1], or as they are stored in floating point, and labels, int64 (N,).

    Raises:
        ValueError: Where the name or split is unknown, or the split cannot give ``n`` examples.
        FileNotFoundError: Where the dataset's files are not where they should be.

    >>> images, labels = load_dataset("digits", n=4)
    >>> images.shape, labels.dtype
    (torch.Size([4, 1, 8, 8]), torch.int64)
    """
    check_range(n, first)
    opened = open_dataset(name, split, data_dir=data_dir, download=download, transform=transform, span=span)
    return opened.take(numbers_of(opened, range(len(opened)) if rows is None else rows, n, first, split))


def check_range(n: int | None, first: int) -> None:
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if first < 0:
        raise ValueError(f"first must be at least 0, got {first}")


def numbers_of(
    opened: Opened, rows: Sequence[int], n: int | None = None, first: int = 0, split: str = "test"
) -> Sequence[int]:
    """Return ``n`` of the rows, from number ``first`` on; raise a `ValueError` where there are fewer."""
    check_range(n, first)
    left = len(rows) - first
    if left < (n or 1):
        which = "images" if not first else f"images, {max(0, left)} from number {first} on"
        raise ValueError(
            f"n is {n or 1}, but the {split} split of {opened.name} has {len(rows)} {which}: ask for at most that many"
        )
    return rows[first : None if n is None else first + n]


def open_dataset(
    name: str,
    split: str = "test",
    *,
    data_dir: str | Path = "data",
    download: bool = False,
    transform: str = "",
    span: Sequence[float] | None = (0.0, 1.0),
) -> Opened:
    """Open a dataset, without reading more than its labels where that can be.

    Args:
        name: a dataset's name (`known_datasets`); a ``.npz``, ``.safetensors`` or ``.pt`` file of ``images`` and ``labels``;
            a folder with a folder of pictures for every class; or ``file.py:function`` or ``package.module:function``, which
            returns what `from_python` takes.
        split, data_dir, download, transform, span: as of `load_dataset`.

    Raises:
        ValueError, FileNotFoundError: As `load_dataset` raises them.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    found = _opened(name, split, Path(data_dir).resolve(), download)
    return replace(found, transform=transform_of(transform), span=None if span is None else (span[0], span[1]))


def _opened(name: str, split: str, data_dir: Path, download: bool) -> Opened:
    if name in OFFERED:
        return OFFERED[name]
    if not name:  # which is the path of the working directory
        raise ValueError("the dataset has no name: name one, or a file or folder (--data)")
    path = Path(name)
    if name in DATASETS or (record := registered(name)) is not None:
        record = DATASETS.get(name) or record
        if isinstance(record, Dataset):
            images, labels = record.read(split, data_dir, download)
            return Opened(name, images, labels, record.classes, record.scale)
        return from_python(record(), name)
    if sources.is_function(name):
        return _of_function(name, tuple(sources.sources_of(name).items()))
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {name!r}: name one that holds 'images' and 'labels' (--data)")
        state = path.stat()
        return Opened(name, *_of_file(path.resolve(), state.st_mtime_ns, state.st_size))
    if path.is_dir():
        images, labels, classes = open_folder(path)
        return Opened(name, images, labels, classes)
    told = unknown_name("dataset", name, known_datasets())
    raise ValueError(f"{told}; or a .npz, .safetensors or .pt file, a folder of pictures by class, or file.py:function")


@lru_cache(maxsize=2)
def _of_file(path: Path, *state: int) -> tuple[Tensor, Tensor]:
    return read_arrays(path)


@lru_cache(maxsize=2)
def _of_function(name: str, source: Any) -> Opened:
    return from_python(sources.call(name), name)


def state_of(name: str) -> Hashable:
    """Return what changes when the data of a name do, without reading them, as far as that can be told."""
    path = Path(name)
    if name in OFFERED:
        return ref(OFFERED[name])  # an id would be given anew once this is gone
    if name not in known_datasets() and sources.is_function(name):
        return tuple(sources.sources_of(name).items())
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
