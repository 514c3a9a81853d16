"""Draw noise that belongs to the sample.

A sample's random start is keyed by (seed, the image itself, restart) and drawn from a private generator, so that batch size,
order, sharding, resuming and early stopping cannot change it, and no global random state is touched. The image is identified
by its content, since an attack called as ``attack(images, labels)`` is not told where the images come from.
"""

from __future__ import annotations

import hashlib
from functools import partial

import torch
from torch import Tensor

from ensemble_attacks.devices import placed
from ensemble_attacks.norms import NORMS, UNIT, Box, in_parts


def sample_keys(images: Tensor, box: Box = UNIT) -> list[bytes]:
    """Return one key per image (N, ...) in the box: a digest of its content in 8 bits, so that rounding does not change it.

    The levels are cut where neither k/255 nor k/16, the values of 8-bit images and of the digits, come near.
    """
    keys = []
    for part in in_parts(images):
        levels = (box.levels(images[part].detach()) * 255 + 0.47).floor().clamp(0, 255)
        pixels = levels.to(torch.uint8).flatten(1).cpu().numpy()
        keys += [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in pixels]
    return keys


def generator_for(key: bytes, seed: int, *counters: int) -> torch.Generator:
    """Return a private CPU generator for a sample (or anything else with a key), a seed and counters such as the restart."""
    message = key + ",".join(map(str, (seed, *counters))).encode()
    state = int.from_bytes(hashlib.blake2b(message, digest_size=4).digest(), "little")
    return torch.Generator().manual_seed(state)


def start_noise(keys: list[bytes], like: Tensor, *, seed: int, restart: int, norm: str) -> Tensor:
    """Return noise shaped ``like`` (N, ...), of the norm's kind: standard normal, or uniform in [-1, 1]."""
    gaussian = NORMS[norm].gaussian
    draw = partial(torch.randn if gaussian else torch.rand, like.shape[1:], dtype=torch.float32, device="cpu")
    noise = torch.stack([draw(generator=generator_for(key, seed, restart)) for key in keys])
    noise = placed(noise, like.device).to(like.dtype)
    return noise if gaussian else 2 * noise - 1


def direction_noise(keys: list[bytes], like: Tensor, *, seed: int, restart: int) -> Tensor:
    """Return noise shaped ``like`` (N, K), uniform in [-1, 1], drawn apart from the noise of the start."""
    draws = [torch.rand(like.shape[1:], generator=generator_for(key, seed, restart, 1), device="cpu") for key in keys]
    return 2 * placed(torch.stack(draws), like.device).to(like.dtype) - 1
