"""Choose images of a dataset: a range in file order, or as many of each class as there should be."""

from __future__ import annotations

import torch
from torch import Tensor

from ensemble_attacks.validation import check_count, check_seed


def stratified(labels: Tensor, count: int, seed: int) -> list[int]:
    """Return the numbers of ``count`` images, in file order, of every class in its share of the labels (N,), to within one.

    Which of a class are taken follows the seed.

    Raises:
        ValueError: Where there are fewer.
    """
    check_count("sample", count)
    check_seed(seed)
    if count > len(labels):
        raise ValueError(f"sample is {count}, but there are {len(labels)} images: ask for at most that many")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    _, inverse, sizes = labels[shuffled].unique(return_inverse=True, return_counts=True)
    # of each image, how far along its class it is: the first `count` of all classes interleaved keep their shares
    order = inverse.argsort(stable=True)
    place = torch.empty(len(labels), dtype=torch.float64)
    place[order] = torch.cat([(torch.arange(int(size), dtype=torch.float64) + 0.5) / int(size) for size in sizes])
    return sorted(shuffled[place.argsort(stable=True)[:count]].tolist())
