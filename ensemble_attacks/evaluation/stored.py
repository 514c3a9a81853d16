"""Say what the tensors of a unit are: their names, types, shapes, and the most bytes that they can take."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ensemble_attacks.data import DATASETS
from ensemble_attacks.evaluation.units import Unit
from ensemble_attacks.files import FLOATING

UNKNOWN_IMAGE = 3 * 4096 * 4096  # the most values of an image whose shape no record says
FLAGS = ("robust", "invalid")


def shape_of(unit: Unit) -> tuple[int, ...] | None:
    """Return the shape (...) of a unit's inputs, where a record says it."""
    known = DATASETS.get(unit.cell.dataset)
    return None if known is None or unit.cell.transform else known.shape


def largest(unit: Unit, stages: int) -> int:
    """Return the most bytes that the tensors of a unit can take: double precision, on all of its images."""
    shape = shape_of(unit)
    values = UNKNOWN_IMAGE if shape is None else prod(shape)
    start, stop = unit.range
    return (1 << 20) + (stop - start) * (8 * values + unit.cell.draws + 32 + len(FLAGS) + stages)


def check_tensors(tensors: dict[str, Tensor], unit: Unit, info: dict[str, Any]) -> None:
    """Raise a `ValueError` unless these are the tensors of a unit: by names, types, shapes, and values that can be flags."""
    images, rows = unit.range[1] - unit.range[0], tensors["rows"].numel() if "rows" in tensors else 0
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "rows": ((rows,), (torch.int64,)),
        "labels": ((rows,), (torch.int64,)),
        **dict.fromkeys((*FLAGS, *(f"stage {part}" for part in info["stages"])), ((rows,), (torch.uint8,))),
        "correct": ((unit.cell.draws, rows), (torch.uint8,)),
        "right": ((images,), (torch.float64,)),
        "margin": ((rows,), FLOATING),
        "x_adv": ((rows, *tensors["x_adv"].shape[1:]) if "x_adv" in tensors else (), FLOATING),
    }
    if differing := sorted(set(expected) ^ set(tensors)):
        what = "missing" if differing[0] in expected else "unknown"
        raise ValueError(f"the tensors are not those of a unit: {differing[0][:60]!r} is {what}")
    for name, (shape, kinds) in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype not in kinds:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: expected {kinds[0]} {shape}")
        if tensor.dtype == torch.uint8 and tensor.numel() and tensor.max() > 1:
            raise ValueError(f"{name} holds {int(tensor.max())}: expected flags, 0 or 1")
    known = shape_of(unit)
    if tensors["x_adv"].dim() < 2 or (known and rows and tuple(tensors["x_adv"].shape[1:]) != tuple(known)):
        raise ValueError(f"x_adv is {tuple(tensors['x_adv'].shape)}: expected inputs (N, ...)")
    low, high = (int(tensors["rows"].min()), int(tensors["rows"].max())) if rows else (0, 0)
    if low < 0 or high >= images:
        raise ValueError(f"rows holds {low} to {high}: expected 0 to {images - 1}")
    if len(tensors["rows"].unique()) < rows:
        raise ValueError("rows holds a sample twice")
