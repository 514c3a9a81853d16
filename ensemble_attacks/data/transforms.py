"""Read and apply ``--transform``: ``resize=256,crop=224``, in this order, to every image."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ensemble_attacks.errors import unknown_name

STEPS = ("resize", "crop")
Transform = Callable[[Tensor], Tensor]


def transform_of(text: str) -> Transform:
    """Return the function (..., H, W) -> (..., H', W') of a text such as ``resize=256,crop=224``; of ``""``, none.

    ``resize`` is the new length of the shorter side (bilinear, antialiased), ``crop`` the side of a square from the centre.

    Raises:
        ValueError: Where the text says something else.
    """
    steps: list[tuple[str, int]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        if name not in STEPS:
            raise unknown_name("step of transform", name, STEPS)
        if not value.isdigit() or not 0 < int(value) <= 1 << 14:
            raise ValueError(f"transform {part!r}: write a number of pixels, as in resize=256,crop=224")
        steps.append((name, int(value)))

    def transform(images: Tensor) -> Tensor:
        for name, pixels in steps:
            from torchvision.transforms.v2 import functional  # not without a step: a third of the command line's start

            if name == "resize":
                images = functional.resize(images, [pixels], antialias=True)
            elif min(images.shape[-2:]) < pixels:
                raise ValueError(f"transform crop={pixels}: an image has {tuple(images.shape[-2:])} pixels, resize it first")
            else:
                images = functional.center_crop(images, [pixels, pixels])
        return images

    return transform
