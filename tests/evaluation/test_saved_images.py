"""Images and labels that ``torch.save`` wrote are read like any others, as tensors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ensemble_attacks.data import load_dataset
from tests.evaluation.own import a_batch

X, Y = a_batch()


@pytest.mark.parametrize("content", [{"images": X, "labels": Y}, (X, Y), {"images": X.double(), "labels": Y.int()}])
def test_a_dictionary_or_a_pair(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "images.pt")
    x, y = load_dataset(str(tmp_path / "images.pt"), n=4, first=3)
    assert torch.equal(x, X[3:7])
    assert torch.equal(y, Y[3:7])
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


class Code:
    """An object that is no data."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (X, "it holds a Tensor: save a dictionary or a pair of images and labels"),
        ({"x": X, "labels": Y}, r"holds no 'images', but labels, x"),
        ({"images": X, "labels": Y.tolist()}, "labels is a list, not a plain tensor"),
        ({"images": X.to(torch.complex64), "labels": Y}, "expected a dense tensor"),
        (Code(), "holds pickled objects"),
    ],
)
def test_anything_else_says_what_to_save(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "images.pth")
    with pytest.raises(ValueError, match=message):
        load_dataset(str(tmp_path / "images.pth"))
