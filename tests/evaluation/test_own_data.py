"""Data of a user's own: files, folders, functions, torch datasets; and which of them are taken."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ensemble_attacks.data import from_python, load_dataset, open_dataset
from ensemble_attacks.data import load as loading
from ensemble_attacks.data.choice import stratified
from ensemble_attacks.data.records import Dataset
from ensemble_attacks.data.transforms import transform_of
from ensemble_attacks.evaluation import origins
from ensemble_attacks.evaluation.manifest import data_digest
from tests.evaluation.own import a_batch, write_folder

X, Y = a_batch()


@pytest.mark.parametrize("kind", ["npz", "safetensors", "float64", "bytes", "channels last", "function", "dataset"])
def test_the_same_images_come_from_anywhere(kind: str, tmp_path: Path) -> None:
    folder, expected = write_folder(tmp_path), X
    name = {"npz": "images.npz", "function": "nets.py:images", "dataset": "nets.py:dataset"}.get(kind, "other.npz")
    if kind == "safetensors":
        name = "other.safetensors"
        save_file({"images": X, "labels": Y}, folder / name)
    elif kind == "float64":
        np.savez(folder / name, images=X.double().numpy(), labels=Y.int().numpy())
    elif kind in ("bytes", "channels last"):
        images = (255 * X).round().byte()
        expected = images.float() / 255
        np.savez(folder / name, images=(images.permute(0, 2, 3, 1) if "last" in kind else images).numpy(), labels=Y.numpy())
    x, y = load_dataset(str(folder / name), n=4, first=3)
    assert torch.equal(x, expected[3:7])
    assert torch.equal(y, Y[3:7])
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": X, "labels": Y}, r"holds no 'images', but labels, x"),
        ({"images": X, "labels": Y[:5]}, r"expected one class index per image, \(10,\)"),
        ({"images": X, "labels": Y.float()}, "one class index per image"),
        ({"images": X, "labels": -Y}, "class indices start at 0"),
        ({"images": (255 * X).long(), "labels": Y}, "store uint8"),
        ({"images": X[:, 0], "labels": Y}, r"grey ones are \(N, 1, H, W\)"),
        ({"images": X.permute(0, 2, 3, 1), "labels": Y}, r"channels last: store images.transpose\(0, 3, 1, 2\)"),
        ({"images": X[:0], "labels": Y[:0]}, "is empty"),
    ],
)
def test_files_that_hold_something_else_say_what_to_store(content: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{key: value.numpy() for key, value in content.items()})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        load_dataset(str(tmp_path / "a.npz"))


def test_what_is_no_file_of_arrays_is_one_line(tmp_path: Path) -> None:
    for name in ("a.npz", "a.safetensors"):
        (tmp_path / name).write_bytes(b"no archive")
        with pytest.raises(ValueError, match="cannot be read as"):
            load_dataset(str(tmp_path / name))
    np.savez(tmp_path / "pickled.npz", images=np.array([{}], dtype=object), labels=np.zeros(1))
    with pytest.raises(ValueError, match="cannot be read as npz"):
        load_dataset(str(tmp_path / "pickled.npz"))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_dataset(str(tmp_path / "nowhere.npz"))
    with pytest.raises(ValueError, match="unknown dataset 'cifar-10': did you mean 'cifar10'"):
        load_dataset("cifar-10")


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    load_dataset(str(folder / "images.npz"))
    np.savez(folder / "images.npz", images=X[:4].numpy(), labels=Y[:4].numpy())
    assert len(load_dataset(str(folder / "images.npz"))[1]) == 4


def write_pictures(folder: Path) -> None:
    from PIL import Image

    for name, shade, size in (("cat", 51, (6, 8)), ("dog", 102, (8, 6)), ("emu", 255, (7, 7))):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", size, (shade, 0, 0)).save(folder / name / "one.png")


def test_folders_of_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    opened = open_dataset(str(tmp_path), transform="resize=5,crop=4")
    x, y = opened.take([0, 2])
    assert x.shape == (2, 3, 4, 4)
    assert y.tolist() == [0, 2]
    assert x[:, 0, 0, 0].tolist() == pytest.approx([0.2, 1.0])
    assert opened.classes == 3
    with pytest.raises(ValueError, match="--transform resize=256,crop=224"):
        load_dataset(str(tmp_path))
    (tmp_path / "classes.txt").write_text("bee\nemu flightless\ncat\ndog\n")
    opened = open_dataset(str(tmp_path))
    assert opened.labels.tolist() == [2, 3, 1]
    assert opened.classes == 4
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match="does not list the folder 'emu'"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [("resize", "number of pixels"), ("crop=-1", "number of pixels"), ("flip=1", "did you mean|known: crop, resize")],
)
def test_transforms_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transform_of(text)


def test_without_a_transform_torchvision_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    assert torch.equal(transform_of("")(X), X)


def test_a_crop_that_is_too_large() -> None:
    with pytest.raises(ValueError, match="resize it first"):
        transform_of("crop=9")(X)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(zip(X, Y.tolist(), strict=True))


@pytest.mark.parametrize("kind", ["arrays", "lists its labels", "loader", "stream"])
def test_what_python_programs_have(kind: str) -> None:
    listed: Any = TensorDataset(X, Y)
    listed.targets = Y.tolist()
    given = {
        "arrays": (X.numpy(), Y.numpy()),
        "lists its labels": listed,
        "loader": DataLoader(TensorDataset(X, Y), batch_size=4),
        "stream": Stream(),
    }[kind]
    x, y = from_python(given, "given").take(range(10))
    assert torch.equal(x, X)
    assert torch.equal(y, Y)


def test_what_is_no_data_says_what_is_expected() -> None:
    for given in (3, [X, Y, X], {"images": X}, "images"):
        with pytest.raises(TypeError, match=r"expected a pair \(images, labels\), a Dataset, or a DataLoader"):
            from_python(given, "given")
    with pytest.raises(ValueError, match="expected pairs"):
        from_python(iter(X.split(5)), "given")
    with pytest.raises(ValueError, match="holds the label 2, but has 2 classes"):
        from_python((X, Y), "given", classes=2)


def test_a_sample_has_every_class_in_its_share() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    for count, expected in ((10, [6, 3, 1]), (50, [30, 15, 5]), (100, [60, 30, 10])):
        chosen = stratified(labels, count, seed=0)
        assert chosen == sorted(set(chosen))
        assert labels[chosen].bincount().tolist() == expected
    assert stratified(labels, 10, 0) == stratified(labels, 10, 0) != stratified(labels, 10, 1)
    with pytest.raises(ValueError, match="there are 100 images"):
        stratified(labels, 101, 0)


def test_what_a_program_gives_anew_is_hashed_anew() -> None:
    """Under the same name, also where it lies in memory where something before it lay."""
    hashes = set()
    for shift in range(20):
        with origins.given(None, ("theirs", from_python((X + shift, Y), "theirs"))):
            hashes |= {data_digest({"name": "theirs"}, len(X)) for _ in range(2)}
    assert len(hashes) == 20


def test_a_dataset_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    records: dict[str, Any] = {"theirs": Dataset(lambda *_: (X, Y), 1, 3, (3, 4, 4), 10), "made": lambda: (X, Y)}
    monkeypatch.setattr(loading, "registered", records.get)
    for name in records:
        assert torch.equal(load_dataset(name)[0], X)


def test_torchvision_datasets_say_where_they_should_be(tmp_path: Path) -> None:
    for name in ("cifar100", "svhn", "mnist"):
        with pytest.raises(FileNotFoundError, match=r"\(--data-dir DIR\), or let torchvision fetch it"):
            load_dataset(name, data_dir=tmp_path)
    write_pictures(tmp_path)
    with pytest.raises(FileNotFoundError, match="ImageNet 1000"):
        load_dataset("imagenet", data_dir=tmp_path)
