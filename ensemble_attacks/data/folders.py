"""Read files of images: ``.npz``, ``.safetensors``, and folders with a folder of pictures for every class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ensemble_attacks.data.opened import as_pair

KEYS = ("images", "labels")
SUFFIXES = (".npz", ".safetensors")
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff")


def read_arrays(path: Path) -> tuple[Tensor, Tensor]:
    """Return images and labels of a ``.npz`` or ``.safetensors`` file that holds both under these names.

    Floating point comes as float32. Nothing is unpickled.

    Raises:
        ValueError: Where it is no such file, or lacks a key.
    """
    try:
        content = _arrays_in(path)
    except (SafetensorError, ValueError, OSError, EOFError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {type(error).__name__}: {reason}") from None
    if missing := [key for key in KEYS if key not in content]:
        raise ValueError(
            f"{path} holds no {missing[0]!r}, but {', '.join(sorted(content)) or 'nothing'}: store 'images' and 'labels'"
        )
    images, labels = as_pair(content["images"], content["labels"], str(path))
    return images.float() if images.is_floating_point() else images, labels


def _arrays_in(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    from zipfile import BadZipFile

    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (BadZipFile, AttributeError):  # numpy returns an array of a .npy file
        raise ValueError("it is no archive of arrays, as np.savez writes") from None


class Pictures:
    """Pictures in files, each decoded as it is asked for, in RGB."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: Tensor, /) -> list[Tensor]:
        return [self._decoded(self.files[int(row)]) for row in rows]

    @staticmethod
    def _decoded(file: Path) -> Tensor:
        from PIL import Image, UnidentifiedImageError
        from torchvision.transforms.v2.functional import pil_to_tensor

        try:
            with Image.open(file) as picture:
                return pil_to_tensor(picture.convert("RGB"))
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file} cannot be read as a picture: {error}") from None


def open_folder(folder: Path) -> tuple[Pictures, Tensor, int]:
    """Return the pictures of a folder with a folder for every class, their labels, and the number of classes.

    Classes are numbered in the order of the folders' names (as torchvision's ``ImageFolder`` does), or in that of
    ``classes.txt`` where the folder holds one, whose lines begin with a folder's name; it may list more than there are.

    Raises:
        ValueError: Where there are no such folders, or one that ``classes.txt`` does not list.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    listed = folder / "classes.txt"
    order = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()] if listed.is_file() else names
    numbers = {name: index for index, name in enumerate(order)}
    if unknown := [name for name in names if name not in numbers]:
        raise ValueError(
            f"{listed} does not list the folder {unknown[0]!r}: its lines begin with the folders' names, in order"
        )
    files = {name: sorted(file for file in (folder / name).rglob("*") if file.suffix.lower() in PICTURES) for name in names}
    if not any(files.values()):
        raise ValueError(
            f"{folder} holds no folders of pictures: expected one folder for every class, with {PICTURES[0]} and so on"
        )
    labels = torch.tensor([numbers[name] for name in names for _ in files[name]], dtype=torch.int64)
    return Pictures([file for name in names for file in files[name]]), labels, len(order)
