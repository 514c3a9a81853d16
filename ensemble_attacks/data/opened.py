"""Hold a dataset from which images are read as they are asked for, by number; make one of what Python programs have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ensemble_attacks.data.transforms import Transform, transform_of
from ensemble_attacks.validation import check_dense

CHANNELS = (1, 3)


class Images(Protocol):
    """Images that are read by number: a tensor, or what reads files."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor | list[Tensor]:
        """Return images (N, C, H, W); a list where they may differ in size."""


@dataclass(frozen=True, eq=False)
class Opened:
    """A dataset, of which nothing need have been read but the labels.

    Attributes:
        name: what errors call it.
        images: (N, ...), such as (N, C, H, W), bytes, other whole numbers up to ``scale``, or floating point.
        labels: (N,) int64.
        classes: the number of classes; ``None`` where it is not known.
        scale: the largest of whole numbers.
        transform: what is done to every image.
        span: what the whole numbers 0 and ``scale`` stand for; ``None``: for nothing, as features have boxes of their own.
    """

    name: str
    images: Images
    labels: Tensor
    classes: int | None = None
    scale: int = 255
    transform: Transform = field(default=transform_of(""))
    span: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.classes is not None and len(self.labels) and self.labels.max() >= self.classes:
            raise ValueError(f"{self.name} holds the label {int(self.labels.max())}, but has {self.classes} classes")
        if len(self.labels) and self.labels.min() < 0:
            raise ValueError(f"{self.name} holds the label {int(self.labels.min())}: class indices start at 0")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Return the images (N, ...) and labels (N,) of some rows: whole numbers in the `span`, others as they are.

        Raises:
            ValueError: Where the images have different sizes, or whole numbers stand for nothing.
        """
        which = torch.as_tensor(rows, dtype=torch.int64)
        picked = self.images[which]
        if isinstance(picked, Tensor):
            images = self.transform(picked)
        else:
            parts = [self.transform(image) for image in picked]
            if len({part.shape for part in parts}) > 1:
                sizes = sorted({tuple(part.shape) for part in parts})
                raise ValueError(
                    f"{self.name} has images of sizes {sizes[0]} and {sizes[-1]}: --transform resize=256,crop=224"
                )
            images = torch.stack(parts) if parts else torch.zeros(0, 3, 1, 1)
        if not images.is_floating_point():
            if self.span is None:
                raise ValueError(
                    f"{self.name} holds whole numbers, but the box has bounds for each feature: store floating point in it"
                )
            low, high = self.span
            images = images.float() / self.scale
            images = images if self.span == (0.0, 1.0) else (low + (high - low) * images).clamp(low, high)
        return images, self.labels[which].clone()


class Items:
    """The images of a torch dataset, each as it is asked for."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, rows: Tensor, /) -> list[Tensor]:
        return [as_image(_pair(self.dataset[int(row)], self.name)[0], self.name) for row in rows]


def _pair(item: Any, name: str) -> tuple[Any, Any]:
    if isinstance(item, (tuple, list)) and len(item) >= 2:
        return item[0], item[1]
    if isinstance(item, dict):
        given, remedy = f"a dict of {', '.join(map(str, item))}", "such as (item['image'], item['label'])"
    else:
        given = "images without labels" if isinstance(item, Tensor) or len(item) == 1 else f"a {type(item).__name__}"
        remedy = "as TensorDataset(images, labels) does"
    raise ValueError(f"{name} gives {given}: expected pairs (image, label), {remedy}")


def as_image(image: Any, name: str) -> Tensor:
    """Return a picture, array or tensor as a tensor (C, H, W)."""
    if isinstance(image, (Tensor, np.ndarray)):
        return torch.as_tensor(image)
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        return pil_to_tensor(image)
    except TypeError:
        raise ValueError(
            f"{name} gives a {type(image).__name__} as image: expected a tensor (C, H, W) or a picture"
        ) from None


def from_python(data: Any, name: str, *, classes: int | None = None) -> Opened:
    """Return a pair of tensors or arrays, a torch ``Dataset``, a ``DataLoader``, or a `Opened`, as the latter.

    A ``DataLoader`` is read to its end, in the order it gives; a ``Dataset``'s images are read as they are asked for.

    Raises:
        TypeError, ValueError: Where it is nothing of these, or holds no images and labels.
    """
    if isinstance(data, Opened):
        return data
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, (Tensor, np.ndarray)) for part in data):
        return Opened(name, *as_pair(data[0], data[1], name), classes=classes)
    if isinstance(data, torch.utils.data.IterableDataset):
        data = torch.utils.data.DataLoader(data, batch_size=100)
    if isinstance(data, torch.utils.data.DataLoader) or (isinstance(data, Iterable) and not hasattr(data, "__getitem__")):
        batches = [_pair(batch, name) for batch in data]
        if not batches:
            raise ValueError(f"{name} is empty: there is nothing to attack")
        images, labels = (torch.cat([torch.as_tensor(part) for part in parts]) for parts in zip(*batches, strict=True))
        return Opened(name, *as_pair(images, labels, name), classes=classes)
    if (
        not hasattr(data, "__getitem__")
        or not hasattr(data, "__len__")
        or isinstance(data, (str, dict, tuple, list, Tensor, np.ndarray))
    ):
        raise TypeError(f"{name} is a {type(data).__name__}: expected a pair (images, labels), a Dataset, or a DataLoader")
    if not len(data):
        raise ValueError(f"{name} is empty: there is nothing to attack")
    if not torch.equal(*(as_image(_pair(data[0], name)[0], name) for _ in range(2))):
        raise ValueError(
            f"{name} gives another image each time it is asked (a random transform?): read it once, into tensors"
        )
    known = classes if classes is not None else len(getattr(data, "classes", ())) or None
    return Opened(name, Items(data, name), _labels_of(data, name), known)


def as_tensors(images: Any, labels: Any, name: str = "x") -> tuple[Any, Any]:
    """Return images (N, ...) and labels (N,): those given, or, without labels, those of what `from_python` takes.

    What is given with labels is left to be checked by whoever takes it.

    Raises:
        TypeError, ValueError: Where neither holds labels.
    """
    if labels is not None:
        return images, labels
    if isinstance(images, (Tensor, np.ndarray)):
        raise TypeError(f"{name} are images without labels: pass both, a Dataset, or a DataLoader of pairs")
    opened = from_python(images, name if isinstance(images, (tuple, list)) else type(images).__name__)
    return opened.take(range(len(opened)))


def _labels_of(dataset: Any, name: str) -> Tensor:
    """Return the labels of a torch dataset: those that it lists, if its first items bear them out, else each item's."""
    for key in ("targets", "labels"):
        listed = getattr(dataset, key, None)
        if isinstance(listed, (list, Tensor, np.ndarray)) and len(listed) == len(dataset):
            labels = torch.as_tensor(listed)
            few = range(min(3, len(dataset)))
            if not labels.is_floating_point() and all(int(_pair(dataset[i], name)[1]) == int(labels[i]) for i in few):
                return labels.long()
    return torch.tensor([int(_pair(dataset[index], name)[1]) for index in range(len(dataset))], dtype=torch.int64)


def as_pair(images: Any, labels: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return images and labels as tensors: bytes or floating point (N, ...), such as (N, C, H, W), and int64 (N,).

    Bytes whose channels come last are turned.

    Raises:
        ValueError: Where they are of another type or shape; says the remedy.
    """
    try:
        x, y = torch.as_tensor(images), torch.as_tensor(labels)
    except TypeError as error:
        raise ValueError(f"{name}: images and labels must be arrays of numbers ({error})") from None
    check_dense(x, f"images of {name}")
    check_dense(y, f"labels of {name}")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"images of {name} have dtype {x.dtype}: store uint8 (0 to 255), or floating point in [0, 1]")
    if x.dim() == 3 and x.shape[1] == x.shape[2]:  # signals (N, C, L) are seldom so
        raise ValueError(f"images of {name} have shape {tuple(x.shape)}: grey ones are (N, 1, H, W), as images[:, None]")
    if x.dim() < 2:
        raise ValueError(f"images of {name} have shape {tuple(x.shape)}: expected (N, ...), such as (N, C, H, W)")
    if x.dim() == 4 and x.shape[1] > max(CHANNELS) and x.shape[3] in CHANNELS:
        if x.is_floating_point():
            raise ValueError(
                f"images of {name} have shape {tuple(x.shape)}, channels last: store images.transpose(0, 3, 1, 2)"
            )
        x = x.permute(0, 3, 1, 2)
    if y.is_floating_point() or y.dtype == torch.bool or y.dim() != 1 or len(y) != len(x):
        raise ValueError(
            f"labels of {name} are {y.dtype} of shape {tuple(y.shape)}: expected one class index per image, ({len(x)},), "
            "such as labels.argmax(1) of one-hot ones"
        )
    if not len(x):
        raise ValueError(f"{name} is empty: there is nothing to attack")
    return x, y.long()
