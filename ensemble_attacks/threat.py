"""Say where inputs may go beside norm and radius: the box that they live in, what may move, eps for each feature.

All three are given as numbers, as tensors, or as files of them, and are stored by their content, so that a run's folder
needs nothing else.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemble_attacks.files import digest
from ensemble_attacks.norms import UNIT, Bound, Box
from ensemble_attacks.validation import check_eps

NUMBER = re.compile(r"[0-9.]{1,30}(e[+-]?[0-9]{1,3})?(/[0-9.]{1,30})?", re.IGNORECASE)
SUFFIXES = (".npy", ".npz", ".safetensors")
KINDS = ("float32", "float64", "bool")  # of arrays that are stored
Stored = dict[str, Any]


def number(text: object, name: str = "eps") -> float:
    """Return the number that a text stands for, also as a fraction such as RobustBench's ``8/255``.

    Raises:
        ValueError: Where it is no number, or too long to be one.

    >>> number("8/255") == 8 / 255
    True
    """
    compact = str(text)[:100].replace(" ", "")
    above, _, below = compact.partition("/")
    try:
        if not NUMBER.fullmatch(compact):
            raise ValueError
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{name} {str(text)[:60]!r} is no number: write it as 0.03 or 8/255") from None


def _parsed(text: str, name: str) -> float:
    """Return the number of a text, as Python writes it, or a fraction, which may be below 0."""
    try:
        return float(text)
    except ValueError:
        below = text.strip().startswith("-")
        return -number(text.strip()[1:], name) if below else number(text, name)


@dataclass(frozen=True, eq=False)
class Threat:
    """A record of where inputs may go.

    Attributes:
        box: the values that inputs can take.
        mask: what may move, bool, of every input (...); ``None``: all.
        radii: eps of each feature (...), by the largest of them, which stands for it where one number is due.
    """

    box: Box = UNIT
    mask: Tensor | None = None
    radii: Mapping[float, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, box: Any = None, movable: Any = None, eps: Sequence[Any] = ()) -> tuple[Threat, tuple[float, ...]]:
        """Return a threat, and the radii as numbers.

        Args:
            box: a `Box`; a pair of bounds, numbers or arrays; ``"-1,1"``; or a file that holds ``low`` and ``high``.
            movable: what may move, an array of truth values or a file that holds one.
            eps: numbers, fractions such as ``"8/255"``, arrays, or files that hold one.

        Raises:
            FileNotFoundError: Where there is no such file.
            TypeError, ValueError: Where something is of another kind, or cannot be used.
        """
        radii: dict[float, Tensor] = {}
        numbers: list[float] = []
        for value in eps:
            found = _radius(value)
            if isinstance(found, Tensor):
                check_eps(found)
                radii[largest := found.max().item()] = found
                found = largest
            numbers.append(found)
        return cls(_box(box), _mask(movable), radii), tuple(numbers)

    @property
    def plain(self) -> bool:
        """Tell whether inputs live in [0, 1], all of them may move, and eps is a number."""
        return self.box == UNIT and self.mask is None and not self.radii

    def eps(self, called: float) -> float | Tensor:
        """Return the radius that a number stands for: the number, or that of each feature."""
        return self.radii.get(called, called)

    def said(self, eps: float) -> str:
        """Return what a title ends in, such as ``in [-1, 1]``; nothing where all is plain."""
        parts = [] if self.box == UNIT else [f"in {self.box}".rstrip(",")]
        if eps in self.radii:
            parts.append(f"eps from {self.radii[eps].min():g}, feature by feature")
        if self.mask is not None:
            parts.append(f"{int(self.mask.sum())} of {self.mask.numel()} features may move")
        return "; ".join(parts)

    # -- storing

    def stored(self) -> Stored | None:
        """Return the threat as JSON can hold it; ``None`` where all is plain."""
        if self.plain:
            return None
        content: Stored = {"low": _stored(self.box.low), "high": _stored(self.box.high)}
        content |= {"mask": None if self.mask is None else _stored(self.mask)}
        content |= {"radii": [_stored(self.radii[key]) for key in sorted(self.radii)]}
        return content | {"sha256": self.digest}

    @classmethod
    def restored(cls, content: Stored | None) -> Threat:
        """Return what `stored` returned of a threat.

        Raises:
            ValueError: Where it is none, or not the one that its hash says.
        """
        if content is None:
            return PLAIN
        try:
            box = Box(_restored(content["low"]), _restored(content["high"]))
            mask = None if content["mask"] is None else _restored(content["mask"])
            if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.any()):
                raise ValueError("mask is no mask that lets something move")
            arrays = [torch.as_tensor(_restored(radius)) for radius in content["radii"]]
            for radius in arrays:
                check_eps(radius)
            threat = cls(box, mask, {radius.max().item(): radius for radius in arrays})
        except (KeyError, TypeError) as error:
            raise ValueError(f"the box, the mask or eps cannot be read: {error}") from None
        if threat.digest != content.get("sha256"):
            raise ValueError("the box, the mask or eps are not those that their hash says")
        return threat

    @property
    def digest(self) -> str:
        """Return the hash of all of it; empty where all is plain."""
        if self.plain:
            return ""
        low, high = (bound if isinstance(bound, Tensor) else float(bound) for bound in (self.box.low, self.box.high))
        return digest(low, high, self.mask, *(self.radii[key] for key in sorted(self.radii)))


PLAIN = Threat()


def _stored(value: Bound) -> float | Stored:
    """Return a number, or an array as its type, its shape, and its values in base64."""
    if not isinstance(value, Tensor):
        return float(value)
    array = value.detach().cpu().contiguous().numpy()
    little = array.astype(array.dtype.newbyteorder("<"))
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": base64.b64encode(little.tobytes()).decode()}


def _restored(value: Any) -> Bound:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    kind, shape = value["dtype"], value["shape"]
    if kind not in KINDS or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"an array is {str(kind)[:20]} of shape {str(shape)[:60]}")
    try:
        raw = base64.b64decode(value["data"], validate=True)
    except (binascii.Error, TypeError) as error:
        raise ValueError(f"an array cannot be read: {error}") from None
    stored = np.dtype(kind).newbyteorder("<")
    if len(raw) != math.prod(shape) * stored.itemsize or not shape:
        raise ValueError(f"an array of shape {str(shape)[:60]} has {len(raw)} bytes")
    array = np.frombuffer(raw, stored).reshape(shape)
    return torch.from_numpy(array.astype(kind))


# -- reading


def _array(value: Any, name: str, keys: Sequence[str] = ()) -> Tensor:
    """Return an array, tensor, or a file's, as a tensor; of an archive, that of a key, or the only one."""
    if isinstance(value, (str, Path)):
        found = _file(Path(value), name)
        chosen = next((key for key in keys if key in found), next(iter(found)) if len(found) == 1 else None)
        if chosen is None:
            raise ValueError(f"{name} {str(value)!r} holds {', '.join(sorted(found)) or 'nothing'}: store {keys[0]!r}")
        value = found[chosen]
    try:
        tensor = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is a {type(value).__name__}: expected numbers, an array, or a file of one") from None
    if not tensor.dim():
        raise ValueError(f"{name} holds one number: write it, or store one for each feature")
    return tensor


def _file(path: Path, name: str) -> dict[str, Any]:
    """Return the arrays of a file; nothing is unpickled."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{name} {str(path)[:200]!r}: expected a number, or a file of arrays ({', '.join(SUFFIXES)})")
    if not path.is_file():
        raise FileNotFoundError(f"{name}: there is no file {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {key: loaded[key] for key in loaded.files}
    except Exception as error:  # whatever a file that is none makes its reader raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} {str(path)!r} cannot be read as {path.suffix[1:]}: {reason}") from None


def _floating(tensor: Tensor) -> Tensor:
    """Return an array of numbers as float32, or as float64 where it is."""
    return tensor if tensor.dtype == torch.double else tensor.float()


def _radius(value: Any) -> float | Tensor:
    if isinstance(value, str) and not value.endswith(SUFFIXES):
        return _parsed(value, "eps")
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or (isinstance(value, Real) and not isinstance(value, (int, float))):
        raise TypeError(f"eps must be a number, got {value!r}")
    if isinstance(value, (int, float)):
        return value
    tensor = _array(value, "eps", ("eps",))
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"eps has dtype {tensor.dtype}: expected one radius for each feature")
    return _floating(tensor)


def _box(value: Any) -> Box:
    if value is None or isinstance(value, Box):
        return value or UNIT
    if isinstance(value, str) and not value.endswith(SUFFIXES):
        value = value.split(",")
    if isinstance(value, (str, Path)):
        found = _file(Path(value), "box")
        if missing := [key for key in ("low", "high") if key not in found]:
            raise ValueError(f"box {str(value)!r} holds no {missing[0]!r}, but {', '.join(sorted(found))}: store both")
        value = found["low"], found["high"]
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"box {str(value)[:60]!r}: write the lowest and the highest value, as -1,1, or name a file")
    return Box(*(_bound(bound) for bound in value))


def _bound(value: Any) -> Bound:
    if isinstance(value, str):
        return _parsed(value, "box")
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    return _floating(_array(value, "box"))


def _mask(value: Any) -> Tensor | None:
    if value is None or (isinstance(value, str) and not value):
        return None
    tensor = _array(value, "movable", ("movable", "mask"))
    if tensor.dtype != torch.bool:
        if not ((tensor == 0) | (tensor == 1)).all():
            raise ValueError(f"movable holds {tensor.max().item():g}: expected truth values, 1 where inputs may move")
        tensor = tensor.bool()
    if not tensor.any():
        raise ValueError("movable is False everywhere: nothing may move; set True where inputs may")
    return tensor
