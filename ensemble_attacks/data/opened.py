"""Hold a dataset from which images are read as they are asked for, by number; make one of what Python programs have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ensemble_attacks.data.transforms import Transform, transform_of

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
        images: (N, C, H, W), bytes, other whole numbers up to ``scale``, or floating point in [0, 1].
        labels: (N,) int64.
        classes: the number of classes; ``None`` where it is not known.
        scale: what whole numbers are divided by.
        transform: what is done to every image.
    """

    name: str
    images: Images
    labels: Tensor
    classes: int | None = None
    scale: int = 255
    transform: Transform = field(default=transform_of(""))

    def __post_init__(self) -> None:
        if self.classes is not None and len(self.labels) and self.labels.max() >= self.classes:
            raise ValueError(f"{self.name} holds the label {int(self.labels.max())}, but has {self.classes} classes")
        if len(self.labels) and self.labels.min() < 0:
            raise ValueError(f"{self.name} holds the label {int(self.labels.min())}: class indices start at 0")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Return the images (N, C, H, W) in [0, 1] and labels (N,) of some rows.

        Raises:
            ValueError: Where the images have different sizes.
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
            images = images.float() / self.scale
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
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise ValueError(f"{name} gives a {type(item).__name__}: expected pairs (image, label)")
    return item[0], item[1]


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
    known = classes if classes is not None else len(getattr(data, "classes", ())) or None
    return Opened(name, Items(data, name), _labels_of(data, name), known)


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
    """Return images and labels as tensors: bytes or floating point (N, C, H, W), and int64 (N,).

    Bytes whose channels come last are turned.

    Raises:
        ValueError: Where they are of another type or shape; says the remedy.
    """
    try:
        x, y = torch.as_tensor(images), torch.as_tensor(labels)
    except TypeError as error:
        raise ValueError(f"{name}: images and labels must be arrays of numbers ({error})") from None
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"images of {name} have dtype {x.dtype}: store uint8 (0 to 255), or floating point in [0, 1]")
    if x.dim() == 3:
        raise ValueError(f"images of {name} have shape {tuple(x.shape)}: grey ones are (N, 1, H, W), as images[:, None]")
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
