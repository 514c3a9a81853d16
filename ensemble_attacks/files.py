"""Write files whole or not at all, read files of tensors as tensors or not at all, and digest what models hold."""

from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import safe_globals

from ensemble_attacks.errors import LedgerError

LARGEST = 4 << 30  # bytes, as they lie and unpacked
SCALAR, ARRAY = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]  # what numpy's pickles call
PLAIN: list[Any] = [
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # of numpy 1 and 2
    *((ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *(np.ndarray, np.dtype, argparse.Namespace),
    *(type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"),
]


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write to, which takes the place of ``path`` once it is written and flushed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def plain_objects() -> Iterator[None]:
    """Let ``torch.load`` with ``weights_only`` also read numpy's numbers and arrays, and parsed arguments: data, no code."""
    with safe_globals(PLAIN):
        yield


def load_tensors(path: Path) -> Any:
    """Return what ``torch.save`` wrote, if it is made of tensors, numbers, strings and containers of them, 4 GiB at most.

    Raises:
        ValueError: Where it is something else, or larger, also if only once unpacked.
    """
    size = path.stat().st_size
    if not size:
        raise ValueError("it is empty")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(entry.file_size for entry in archive.infolist()))
    except zipfile.BadZipFile:
        raise ValueError("it is no torch file, or damaged") from None
    if size > LARGEST:
        raise ValueError(f"it holds {size / 2**30:.1f} GiB, more than the {LARGEST >> 30} that are read")
    try:
        with plain_objects():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load and pickle fail in many ways on what is no checkpoint, or holds code
        raise ValueError(f"it is no torch file, or holds pickled objects ({type(error).__name__})") from None


def digest(*values: object) -> str:
    """Return a hash of tensors, by types, shapes and values; of whatever else a model's state holds, by what it prints."""
    state = sha256()
    for value in values:
        if not isinstance(value, Tensor):
            state.update(repr(value).encode())
            continue
        tensor = value.int_repr() if value.is_quantized else value
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there entirely or not at all.

    Raises:
        LedgerError: Where it cannot be written.
    """
    try:
        with whole_file(path) as file:
            file.write(data)
    except OSError as error:
        raise LedgerError(
            f"{path} cannot be written ({error.strerror}): mend that and run the same command again: nothing is lost"
        ) from error
