"""Read files of images: ``.npz``, ``.safetensors``, ``.pt``, and folders with a folder of pictures for every class."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemble_attacks.data.opened import as_pair
from ensemble_attacks.files import LARGEST, check_plain, load_tensors, read_tensors, read_whole

KEYS = ("images", "labels")
SAVED = (".pt", ".pth")  # by torch.save
SUFFIXES = (".npz", ".safetensors", *SAVED)
PACKED = 10  # how much larger than the file its arrays may be, beyond `LARGEST`
MOST_PIXELS = 50_000_000  # of a picture
MOST_LIST = 16 << 20  # bytes of classes.txt
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff")


def read_arrays(path: Path) -> tuple[Tensor, Tensor]:
    """Return images and labels of a ``.npz``, ``.safetensors`` or ``.pt`` file that holds both under these names.

    The latter may also hold them as a pair. Floating point comes as float32. Tensors and arrays alone are read, no
    code is run.

    Raises:
        ValueError: Where it is no such file, or lacks a key.
    """
    try:
        content = _arrays_in(path)
    except (ValueError, OSError, EOFError, KeyError, NotImplementedError) as error:
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
        return dict(read_tensors(path.resolve())[0])
    if path.suffix in SAVED:
        return _saved(load_tensors(path.resolve()))
    try:
        with zipfile.ZipFile(path) as archive:
            _check_sizes(archive, path.stat().st_size)
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except zipfile.BadZipFile:
        raise ValueError("it is no archive of arrays, as np.savez writes") from None


def _saved(content: Any) -> dict[str, Any]:
    """Return what ``torch.save`` wrote by name; a pair is images and labels."""
    if isinstance(content, (tuple, list)) and len(content) == len(KEYS):
        content = dict(zip(KEYS, content, strict=True))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}: save a dictionary or a pair of images and labels")
    found = {str(key): value for key, value in content.items()}
    for key in set(KEYS) & set(found):
        check_plain(found[key], key)
        found[key] = found[key].clone()  # what is mapped would change with the file
    return found


def _check_sizes(archive: zipfile.ZipFile, size: int) -> None:
    """Raise a `ValueError` where the arrays of an archive, a file of ``size`` bytes, are too large, or say that they are."""
    most = max(LARGEST, PACKED * size)
    entries = archive.infolist()
    if (unpacked := sum(entry.file_size for entry in entries)) > most:
        raise ValueError(f"it holds {unpacked:,} bytes once unpacked, more than the {most:,} that are read")
    for entry in entries:
        with archive.open(entry) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        if math.prod(shape) * dtype.itemsize > entry.file_size:
            raise ValueError(
                f"{entry.filename[:60]} says that its shape is {shape}, of which {entry.file_size:,} bytes are there"
            )


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
            if not file.is_file():
                raise OSError("it is no file")
            with Image.open(file) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise OSError(f"it has {picture.width} x {picture.height} pixels")
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
    said = read_whole(listed.resolve(), MOST_LIST).decode() if listed.is_file() else ""
    order = [line.split()[0] for line in said.splitlines() if line.strip()] if listed.is_file() else names
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
