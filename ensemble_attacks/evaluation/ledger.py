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
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors.torch import save
from torch import Tensor

from ensemble_attacks.errors import LedgerError
from ensemble_attacks.evaluation.leases import lease, lives, sealed
from ensemble_attacks.evaluation.stored import check_tensors, largest
from ensemble_attacks.evaluation.units import Unit, canonical
from ensemble_attacks.files import abandoned, is_file, read_whole, tensors_in, write_whole
from ensemble_attacks.schema import MOST_JSON, Failure, Mark, Record, StoredManifest, UnitInfo, check, parse

logger = logging.getLogger(__name__)
SCHEMA = 4  # of a run's folder; it grows with every change of what one must hold
ATTEMPTS = 3  # after which a unit that fails is left alone
MANIFEST, SUMMARY = "manifest.json", "summary.json"
FOLDERS = ("units", "failed", "running", "driving", "quarantine")


@dataclass(frozen=True, eq=False)
class Result:
    """A record of what a unit left: tensors, and numbers."""

    tensors: dict[str, Tensor]
    info: dict[str, Any]


def unsealed(data: bytes, kind: type[BaseModel]) -> dict[str, Any]:
    """Return the content of sealed JSON; raise a `ValueError` if anything has changed, or it is no record of its kind."""
    content = parse(data)
    if not isinstance(content, dict) or content.pop("sha256", None) != hashlib.sha256(canonical(content)).hexdigest():
        raise ValueError("checksum mismatch")
    check(content, kind)
    return content


def read_manifest(path: Path, kind: type[BaseModel] = StoredManifest) -> dict[str, Any]:
    """Return the manifest of a run, or of a bundle, that this version of the package can read.

    Raises:
        LedgerError: Where another version wrote it; says which.
        ValueError: Where it is damaged, or no record of its kind.
    """
    content = unsealed(read_whole(path, MOST_JSON), Record)
    if (schema := content.get("schema")) != SCHEMA:
        age = "a later" if isinstance(schema, int) and schema > SCHEMA else "an earlier"
        raise LedgerError(
            f"{path} was written by {age} version (schema {str(schema)[:20]}, this one has {SCHEMA}): begin anew in another "
            f"folder, or use the version of its code, {str(content.get('code'))[:60]}"
        )
    check(content, kind)
    return content


class Ledger:
    """A run's folder, which tells and takes what each unit has left.

    Args:
        folder: the folder, which is no symbolic link.
        manifest: what the run is. An existing run must be the same, but for ``places``. ``None`` reads the one that is
            there; nothing in the folder is then written or moved, unless `go_on` is called.

    Raises:
        FileNotFoundError: Where there is nothing to read.
        LedgerError: Where the folder cannot be used, a manifest that is to be read is damaged or asks for nothing, another
            version wrote it, or the run is another (the message says what differs).
    """

    def __init__(self, folder: Path, manifest: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.writes = False
        for place in (folder, *(folder / name for name in FOLDERS)):
            if place.is_symlink():
                raise LedgerError(f"{place} is a symbolic link: give the folder itself")
            if place.exists() and not place.is_dir():
                raise LedgerError(f"{place} is no folder, and cannot be written or read as one: choose another (--out)")
        path = folder / MANIFEST
        ours = (folder / "units").is_dir() or not folder.is_dir() or all(map(_unfinished, folder.iterdir()))
        if not os.path.lexists(path) and not ours:
            raise LedgerError(f"{folder} holds other things, and no run: choose another folder (--out)")
        stored = self._stored(path, given=manifest is not None)
        if manifest is None and stored is None:
            raise FileNotFoundError(f"{folder} holds no run (no {MANIFEST}): give the folder of `evaluate --out`")
        if stored is not None and manifest is not None:
            new = json.loads(json.dumps(manifest | {"schema": SCHEMA}))
            if differing := difference(stored | {"places": None}, new | {"places": None}):
                raise LedgerError(f"{folder} holds another run, with {differing}: choose another folder (--out)")
        self.manifest: dict[str, Any] = stored or json.loads(json.dumps((manifest or {}) | {"schema": SCHEMA}))
        if manifest is not None:
            self.manifest["places"] = manifest.get("places")
            self.go_on()
            if not is_file(path) or sealed(self.manifest) != read_whole(path):
                write_whole(path, sealed(self.manifest))

    def _stored(self, path: Path, *, given: bool) -> dict[str, Any] | None:
        """Return the manifest that is there; ``None`` where there is none, or a damaged one that another stands in for."""
        if not os.path.lexists(path):
            return None
        try:
            return read_manifest(path, Record if given else StoredManifest)
        except ValueError as error:
            if not given:
                remedy = "run the command that made it again, units are kept"
                raise LedgerError(f"{path} is damaged: {remedy} ({error})") from error
            self._quarantine(path)
            return None

    def go_on(self) -> Ledger:
        """Let the folder be written from now on, and what is damaged be put into quarantine; return the ledger.

        Raises:
            LedgerError: Where the folder cannot be written.
        """
        try:
            for name in FOLDERS:
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(
                f"{self.folder} cannot be written ({error.strerror}): choose another folder (--out)"
            ) from error
        self.writes = True
        return self

    # -- units

    def done(self, unit: Unit) -> bool:
        return is_file(self._info(unit))

    def open(self, unit: Unit) -> bool:
        """Tell whether a unit is neither done nor given up."""
        return not self.done(unit) and self.failures(unit) < ATTEMPTS

    def examine(self, unit: Unit) -> Result:
        """Return the unit's result.

        Raises:
            FileNotFoundError: Where it is not there.
            ValueError: Where it is damaged, or no result of this unit; says what is wrong.
        """
        info = unsealed(read_whole(self._info(unit), MOST_JSON), UnitInfo)
        if differing := difference(info["unit"], json.loads(canonical(unit.content))):
            raise ValueError(f"another unit's: {differing[:200]}")
        data = read_whole(self._tensors(unit), largest(unit, len(info["stages"])))
        if hashlib.sha256(data).hexdigest() != info["tensors"]:
            raise ValueError("checksum mismatch of the tensors")
        tensors = tensors_in(data)
        check_tensors(tensors, unit, info)
        return Result(tensors, info)

    def read(self, unit: Unit) -> Result | None:
        """Return the unit's result; ``None`` if it is not done.

        A result that is damaged counts as not done; a ledger that goes on puts it into quarantine.
        """
        try:
            return self.examine(unit)
        except FileNotFoundError as error:
            if not self.done(unit):
                return None
            reason: Exception = error
        except ValueError as error:
            reason = error
        told = "put into quarantine, to be computed again" if self.writes else "`resume` computes it again"
        logger.warning("%s is damaged (%s): %s", unit.name, reason, told)
        if self.writes:
            for path in (self._info(unit), self._tensors(unit)):
                self._quarantine(path)
        return None

    def info(self, unit: Unit) -> dict[str, Any] | None:
        """Return the numbers of a unit that is done, without its tensors; ``None`` where they are missing or damaged."""
        try:
            return unsealed(read_whole(self._info(unit), MOST_JSON), UnitInfo)
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

    # -- who is at work

    def running(self, unit: Unit) -> AbstractContextManager[None]:
        """Mark the unit as in work, by this process, within the context."""
        return lease(self.folder / "running", unit.identity, {"unit": unit.content})

    def driving(self) -> AbstractContextManager[None]:
        """Mark the run as driven, by this process, within the context."""
        return lease(self.folder / "driving", "run", {})

    def in_work(self, kind: str = "running") -> list[dict[str, Any]]:
        """Return what is marked as in work, or (``driving``) who drives the run.

        ``alive`` tells whether the process that does it still is: it has touched its mark not long ago and, on this machine,
        is there.
        """
        return [mark | {"alive": lives(path, mark)} for path, mark in self._all(kind, Mark)]

    def forget_dead(self) -> None:
        """Remove the marks and temporary files of processes that are no more; those of other machines are left to them.

        A mark of another machine is removed once its lease has run out, a temporary file after a day.
        """
        for kind in ("running", "driving"):
            for path, mark in self._all(kind, Mark):
                if not lives(path, mark):
                    path.unlink(missing_ok=True)
        for folder in (self.folder, *(self.folder / name for name in FOLDERS)):
            for left in folder.glob(".*.tmp"):
                if abandoned(left):
                    left.unlink(missing_ok=True)

    # -- failures

    def fail(self, unit: Unit, error: str) -> int:
        """Note one more failure of the unit; return how many there are."""
        failures = self.failures(unit) + 1
        where = self.folder / "failed" / f"{unit.identity}.json"
        write_whole(where, sealed({"unit": unit.content, "failures": failures, "error": error}))
        return failures

    def failures(self, unit: Unit) -> int:
        try:
            path = self.folder / "failed" / f"{unit.identity}.json"
            return int(unsealed(read_whole(path, MOST_JSON), Failure)["failures"])
        except (OSError, ValueError):
            return 0

    def failed(self) -> list[dict[str, Any]]:
        """Return what has failed and is not done: each unit's content, failures and last error."""
        return [failure for _, failure in self._all("failed", Failure)]

    def quarantined(self) -> list[str]:
        """Return the names of the files that were damaged."""
        folder = self.folder / "quarantine"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def retry_failed(self) -> None:
        """Forget all failures, so that the units are tried again."""
        for path in (self.folder / "failed").glob("*.json"):
            path.unlink(missing_ok=True)

    def _all(self, kind: str, record: type[BaseModel]) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield the files of a folder that are records of a kind, with their content."""
        for path in sorted((self.folder / kind).glob("*.json")):
            try:
                yield path, unsealed(read_whole(path, MOST_JSON), record)
            except (OSError, ValueError):
                continue

    def _info(self, unit: Unit) -> Path:
        return self.folder / "units" / f"{unit.identity}.json"

    def _tensors(self, unit: Unit) -> Path:
        return self.folder / "units" / f"{unit.identity}.safetensors"

    def _quarantine(self, path: Path) -> None:
        if os.path.lexists(path):
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
