"""Give models randomness of their own, which is fresh by default, and can be seeded and frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def seed_draws(model: nn.Module, seed: int, device: str | torch.device = "cpu") -> None:
    """Start the generators of all parts of a model that own one, each at a seed of its own, on the device that draws."""
    for index, module in enumerate(module for module in model.modules() if isinstance(module, OwnDraws)):
        module.own_draws(seed + index, device)


class OwnDraws(nn.Module):
    """A module that draws from a generator of its own, and leaves the global ones alone."""

    generator: torch.Generator
    frozen_at: int | None

    def own_draws(self, seed: int | None = None, device: str | torch.device = "cpu") -> None:
        """Start the generator, at ``seed`` or anywhere.

        The CPU draws the same for a model on any device; the model's own device is faster.
        """
        self.generator, self.frozen_at = torch.Generator(device), None
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def next_draws(self) -> torch.Generator:
        """Return the generator, for the draws of one forward pass."""
        return self.generator if self.frozen_at is None else self.generator.manual_seed(self.frozen_at)

    def draws_for(self, images: int) -> int:
        """Return how many draws a forward pass of so many images makes: one for all of them, if they are frozen."""
        return images if self.frozen_at is None else 1

    @contextmanager
    def frozen_noise(self, seed: int = 0) -> Iterator[None]:
        """Freeze the draws within the context; afterwards, the model draws on where it was.

        Every forward pass makes the same draws, and every image gets the same, so that the model is a function of the image
        alone.
        """
        state, before = self.generator.get_state(), self.frozen_at
        self.frozen_at = seed
        try:
            yield
        finally:
            self.frozen_at = before
            self.generator.set_state(state)
