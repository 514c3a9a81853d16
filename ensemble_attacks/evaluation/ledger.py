"""Keep what a run has done, so that it can be killed at any instant: a folder of units, each of which is there or is not.

A unit is one attack on one range of images of one cell (model, vote, eps, seed, ...). Its identity is the hash of all that
decides its result. It is done when ``units/<identity>.json`` exists, which is written last (under another name, flushed,
renamed) and holds the checksum of its tensors beside it. Nothing grows, and nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ensemble_attacks.errors import LedgerError
from ensemble_attacks.evaluation.units import Unit, canonical
from ensemble_attacks.files import write_whole

logger = logging.getLogger(__name__)
SCHEMA = 2
ATTEMPTS = 3  # after which a unit that fails is left alone
MANIFEST, SUMMARY = "manifest.json", "summary.json"
FOLDERS = ("units", "failed", "running", "quarantine")


@dataclass(frozen=True, eq=False)
class Result:
    """A record of what a unit left: tensors, and numbers."""

    tensors: dict[str, Tensor]
    info: dict[str, Any]


def sealed(content: dict[str, Any]) -> bytes:
    """Return content as JSON with its own checksum."""
    return json.dumps(content | {"sha256": hashlib.sha256(canonical(content)).hexdigest()}, indent=1).encode() + b"\n"


def unsealed(data: bytes) -> dict[str, Any]:
    """Return the content of sealed JSON; raise a `ValueError` if anything has changed."""
    content = json.loads(data)
    if not isinstance(content, dict) or content.pop("sha256", None) != hashlib.sha256(canonical(content)).hexdigest():
        raise ValueError("checksum mismatch")
    return content


def alive(pid: int) -> bool:
    """Tell whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


class Ledger:
    """A run's folder, which tells and takes what each unit has left.

    Args:
        folder: the folder, which is no symbolic link.
        manifest: what the run is; ``None`` reads it. An existing run must be the same, but for ``places``.

    Raises:
        FileNotFoundError: Where there is nothing to read.
        LedgerError: Where the folder cannot be used, a manifest that is to be read is damaged, or the run is another (the
            message says what differs).
    """

    def __init__(self, folder: Path, manifest: dict[str, Any] | None = None) -> None:
        self.folder = folder
        for place in (folder, *(folder / name for name in FOLDERS)):
            if place.is_symlink():
                raise LedgerError(f"{place} is a symbolic link: give the folder itself")
        path = folder / MANIFEST
        ours = (folder / "units").is_dir() or not folder.is_dir() or all(map(_unfinished, folder.iterdir()))
        if not path.exists() and not ours:
            raise LedgerError(f"{folder} holds other things, and no run: choose another folder (--out)")
        stored = None
        if path.exists():
            try:
                stored = unsealed(path.read_bytes())
            except ValueError as error:
                if manifest is None:
                    raise LedgerError(f"{path} is damaged: run the command that made it again, units are kept") from error
                self._quarantine(path)
        if manifest is None and stored is None:
            raise FileNotFoundError(f"{folder} holds no run (no {MANIFEST}): give the folder of `evaluate --out`")
        if stored is not None and stored.get("schema") != SCHEMA:
            raise LedgerError(
                f"{path} has schema {stored.get('schema')}, this version reads {SCHEMA}: choose another folder"
            )
        if stored is not None and manifest is not None:
            new = json.loads(json.dumps(manifest | {"schema": SCHEMA}))
            if differing := difference(stored | {"places": None}, new | {"places": None}):
                raise LedgerError(f"{folder} holds another run, with {differing}: choose another folder (--out)")
        self.manifest: dict[str, Any] = stored or json.loads(json.dumps((manifest or {}) | {"schema": SCHEMA}))
        if manifest is not None:
            self.manifest["places"] = manifest.get("places")
        try:
            for name in FOLDERS:
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(f"{folder} cannot be written ({error.strerror}): choose another folder (--out)") from error
        if sealed(self.manifest) != (path.read_bytes() if path.exists() else b""):
            write_whole(path, sealed(self.manifest))

    # -- units

    def done(self, unit: Unit) -> bool:
        return self._info(unit).exists()

    def open(self, unit: Unit) -> bool:
        """Tell whether a unit is neither done nor given up."""
        return not self.done(unit) and self.failures(unit) < ATTEMPTS

    def read(self, unit: Unit) -> Result | None:
        """Return the unit's result; ``None`` if it is not done.

        A result that is damaged is put into quarantine, and its unit is then not done.
        """
        info_path, tensors_path = self._info(unit), self._tensors(unit)
        if not info_path.exists():
            return None
        try:
            info = unsealed(info_path.read_bytes())
            data = tensors_path.read_bytes()
            if info["unit"] != json.loads(canonical(unit.content)):
                raise ValueError("another unit's")
            if hashlib.sha256(data).hexdigest() != info["tensors"]:
                raise ValueError("checksum mismatch of the tensors")
            return Result(load(data), info)
        except (ValueError, KeyError, FileNotFoundError, SafetensorError) as error:
            logger.warning("%s is damaged (%s): put into quarantine, to be computed again", unit.name, error)
            for path in (info_path, tensors_path):
                self._quarantine(path)
            return None

    def info(self, unit: Unit) -> dict[str, Any] | None:
        """Return the numbers of a unit that is done, without its tensors; ``None`` where they are missing or damaged."""
        try:
            return unsealed(self._info(unit).read_bytes())
        except (OSError, ValueError):
            return None

    def write(self, unit: Unit, tensors: dict[str, Tensor], info: dict[str, Any]) -> Result:
        """Make the unit done: store its tensors and numbers, and return them as its result."""
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        write_whole(self._tensors(unit), data)
        info = info | {"unit": unit.content, "tensors": hashlib.sha256(data).hexdigest()}
        write_whole(self._info(unit), sealed(info))
        (self.folder / "failed" / f"{unit.identity}.json").unlink(missing_ok=True)
        return Result(tensors, info)

    @contextmanager
    def running(self, unit: Unit) -> Iterator[None]:
        """Mark the unit as in work, by this process, within the context."""
        mark = self.folder / "running" / f"{unit.identity}.json"
        here = {"host": platform.node(), "pid": os.getpid(), "since": time.time()}
        write_whole(mark, sealed({"unit": unit.content, **here}))
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)

    def in_work(self) -> list[dict[str, Any]]:
        """Return what is marked as in work.

        ``alive`` tells whether the process that does it still is, as far as this machine can tell.
        """
        here = platform.node()
        return [mark | {"alive": mark.get("host") != here or alive(mark["pid"])} for mark in self._all("running")]

    def forget_running(self) -> None:
        """Remove all marks of units in work, and the files that were being written by processes that are no more."""
        for mark in (self.folder / "running").glob("*.json"):
            mark.unlink(missing_ok=True)
        for left in self.folder.glob("**/.*.tmp"):
            pid = left.name.split(".")[-2]
            if pid.isdigit() and not alive(int(pid)):
                left.unlink(missing_ok=True)

    # -- failures

    def fail(self, unit: Unit, error: str) -> int:
        """Note one more failure of the unit; return how many there are."""
        failures = self.failures(unit) + 1
        where = self.folder / "failed" / f"{unit.identity}.json"
        write_whole(where, sealed({"unit": unit.content, "failures": failures, "error": error}))
        return failures

    def failures(self, unit: Unit) -> int:
        path = self.folder / "failed" / f"{unit.identity}.json"
        try:
            return int(unsealed(path.read_bytes())["failures"])
        except (OSError, ValueError, KeyError):
            return 0

    def failed(self) -> list[dict[str, Any]]:
        """Return what has failed and is not done: each unit's content, failures and last error."""
        return list(self._all("failed"))

    def quarantined(self) -> list[str]:
        """Return the names of the files that were damaged."""
        return sorted(path.name for path in (self.folder / "quarantine").iterdir())

    def retry_failed(self) -> None:
        """Forget all failures, so that the units are tried again."""
        for path in (self.folder / "failed").glob("*.json"):
            path.unlink(missing_ok=True)

    def _all(self, kind: str) -> Iterator[dict[str, Any]]:
        for path in sorted((self.folder / kind).glob("*.json")):
            try:
                yield unsealed(path.read_bytes())
            except (OSError, ValueError):
                continue

    def _info(self, unit: Unit) -> Path:
        return self.folder / "units" / f"{unit.identity}.json"

    def _tensors(self, unit: Unit) -> Path:
        return self.folder / "units" / f"{unit.identity}.safetensors"

    def _quarantine(self, path: Path) -> None:
        if path.exists():
            (self.folder / "quarantine").mkdir(exist_ok=True)
            path.replace(self.folder / "quarantine" / f"{path.name}.{time.time_ns()}")


def _unfinished(path: Path) -> bool:
    """Tell whether a path is what a run leaves that was killed as it began."""
    return path.name in FOLDERS or (path.name.startswith(".") and path.name.endswith(".tmp"))


def difference(stored: Any, new: Any, where: str = "") -> str:
    """Return what differs first between two JSON values, for people; empty if nothing does."""
    if isinstance(stored, dict) and isinstance(new, dict):
        for key in {**new, **stored}:
            inside = difference(stored.get(key), new.get(key), f"{where}.{key}" if where else key)
            if inside:
                return inside
        return ""
    if isinstance(stored, list) and isinstance(new, list) and len(stored) == len(new):
        pairs = enumerate(zip(stored, new, strict=True))
        return next((inside for i, (a, b) in pairs if (inside := difference(a, b, f"{where}[{i}]"))), "")
    return "" if stored == new else f"{where} = {stored!r}, not {new!r}"
