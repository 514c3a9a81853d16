"""Write files whole or not at all, read what others wrote as data or not at all, and digest what models hold."""

from __future__ import annotations

import argparse
import glob
import os
import platform
import secrets
import shutil
import stat
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor
from torch.serialization import safe_globals

from ensemble_attacks.errors import LedgerError

LARGEST = 4 << 30  # bytes, as they lie and unpacked
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ABANDONED = 24 * 3600  # seconds after which nobody is still writing a temporary file
SCALAR, ARRAY = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]  # what numpy's pickles call
PLAIN: list[Any] = [
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # of numpy 1 and 2
    *((ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *(np.ndarray, np.dtype, argparse.Namespace),
    *(type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"),
]


@cache
def machine() -> str:
    """Return a short name of this machine, as far as a pid says something: its name, its boot, its space of pids."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return sha256(" ".join(parts).encode()).hexdigest()[:12]


def alive(pid: int) -> bool:
    """Tell whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write to, which takes the place of ``path`` once it is written and flushed.

    Until then it has a name that nobody can guess, and is created: a link or file that waits under a name is not followed.
    """
    temporary = path.with_name(f".{path.name}.{machine()}.{os.getpid()}.{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    try:
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to write into, which takes the name of ``path`` once all of it is written and flushed.

    Until then it lies beside, under a name that nobody can guess; what a process that is no more has left there is removed.

    Raises:
        FileExistsError: Where something is there already, or by then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.{machine()}.{os.getpid()}.{secrets.token_hex(8)}.part")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists: choose another folder")
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def abandoned(temporary: Path) -> bool:
    """Tell whether nobody writes to what `whole_file` or `whole_folder` began any more, as far as this machine can tell.

    A file of another machine is somebody's until it has not been touched for a day.
    """
    *_, host, pid, _, _ = ["", "", *temporary.name.split(".")]
    try:
        idle = time.time() - temporary.lstat().st_mtime
    except FileNotFoundError:
        return False
    return idle > ABANDONED or (host == machine() and pid.isdecimal() and not alive(int(pid)))


def is_file(path: Path) -> bool:
    """Tell whether there is a regular file, which no link stands in for."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def read_whole(path: Path, most: int = LARGEST) -> bytes:
    """Return what a regular file of at most ``most`` bytes holds.

    Raises:
        FileNotFoundError: Where nothing is there.
        ValueError: Where it is a link, a folder, a pipe or a device, or larger; nothing is read, and nothing waited for.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        what = "a symbolic link" if path.is_symlink() else "not readable"
        raise ValueError(f"{path} is {what} ({error.strerror})") from None
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_size > most:
        os.close(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError(f"{path} is no regular file")
        raise ValueError(f"{path} holds {about.st_size:,} bytes, more than the {most:,} that are read")
    with os.fdopen(descriptor, "rb") as file:
        return file.read(most)


NOT_SAFE = (SafetensorError, KeyError, TypeError, ValueError, RuntimeError)  # what reading no safetensors ends in


def tensors_in(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a file of safetensors, which are as large as the file is; nothing is unpickled.

    Raises:
        ValueError: Where it is no such file, or holds types that torch has not.
    """
    try:
        return load(data)
    except NOT_SAFE as error:
        raise ValueError(f"no safetensors ({' '.join(str(error).split())[:200]})") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file of safetensors, of any size, and the texts beside them.

    Raises:
        ValueError: Where it is something else: it is not read beyond its header.
    """
    if not is_file(path):
        raise ValueError(f"{path} is no regular file")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except NOT_SAFE as error:
        raise ValueError(f"no safetensors ({' '.join(str(error).split())[:200]})") from None


@contextmanager
def plain_objects() -> Iterator[None]:
    """Let ``torch.load`` with ``weights_only`` also read numpy's numbers and arrays, and parsed arguments: data, no code."""
    with safe_globals(PLAIN):
        yield


def load_tensors(path: Path) -> Any:
    """Return what ``torch.save`` wrote, if it is made of tensors, numbers, strings and containers of them, 4 GiB at most.

    Its tensors are mapped, where the file allows it: what is never looked at takes no memory.

    Raises:
        ValueError: Where it is something else, or larger, also if only once unpacked.
    """
    if not is_file(path):
        raise ValueError("it is no regular file")
    size, mapped = path.stat().st_size, False
    if not size:
        raise ValueError("it is empty")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            size = max(size, sum(entry.file_size for entry in entries))
            mapped = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError):
        raise ValueError("it is no torch file, or damaged") from None
    if size > LARGEST:
        raise ValueError(f"it holds {size / 2**30:.1f} GiB, more than the {LARGEST >> 30} that are read")
    try:
        with plain_objects():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load and pickle fail in many ways on what is no checkpoint, or holds code
        raise ValueError(f"it is no torch file, or holds pickled objects ({type(error).__name__})") from None


def check_plain(tensor: object, what: str) -> None:
    """Raise a `ValueError` unless a loaded tensor is dense, on the CPU, of torch's own class, and stored as large as it is.

    A stored view may claim gigabytes of which a kilobyte is there.
    """
    if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, torch.nn.Parameter):
        raise ValueError(f"{what} is a {type(tensor).__name__}, not a plain tensor")
    known = not tensor.is_floating_point() or tensor.dtype in FLOATING
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not (known and dense) or tensor.is_complex():
        kind = "quantised" if tensor.is_quantized else str(tensor.dtype)
        raise ValueError(f"{what} is {tensor.layout}, {kind}, on {tensor.device}: expected a dense tensor of real numbers")
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}, of which {stored:,} bytes are stored: expected all of it")


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
