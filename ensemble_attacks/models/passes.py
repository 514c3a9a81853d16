"""Count what an attack spends: the forward and backward passes of the model, per image, whoever's attack it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ensemble_attacks.models.ask import ask, ask_members, member_probabilities


def passes_per_image(row: dict[str, Any]) -> float:
    """Return the forward and backward passes per image that a summary's row tells."""
    return row["forwards_per_image"] + row["backwards_per_image"]


class CountingModel(nn.Module):
    """A model that counts the images put through it, forward and backward."""

    asks_itself = True  # as of `Asked`
    watch: Callable[[Tensor, Tensor], Callable[[], None]] | None = None
    """Called with the images (B, ...) and scores (B, K) of each forward pass; what it returns, with the backward one."""

    def __init__(self, model: nn.Module, on_pass: Callable[[int], object] | None = None) -> None:
        super().__init__()
        self.counted: nn.Module = model
        self.forwards = self.backwards = 0
        self._on_pass = on_pass or (lambda images: None)
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        return self._count(x, ask(self.counted, x))

    def _count(self, x: Tensor, outputs: Tensor) -> Tensor:
        images = len(x)
        self.forwards += images
        self._on_pass(images)
        seen = None if self.watch is None else self.watch(x, self._scores(outputs))
        if outputs.requires_grad:
            outputs.register_hook(lambda gradient: self._count_backward(images, seen))
        return outputs

    def _scores(self, outputs: Tensor) -> Tensor:
        return outputs

    def _count_backward(self, images: int, seen: Callable[[], None] | None) -> None:
        self.backwards += images
        self._on_pass(images)
        if seen is not None:
            seen()


@contextmanager
def uncounted(model: nn.Module) -> Iterator[None]:
    """Leave passes made within the context out of the count: those of checks, which are no part of an attack."""
    counters = [part for part in model.modules() if isinstance(part, CountingModel)]
    before = [(counter.forwards, counter.backwards, counter.watch) for counter in counters]
    for counter in counters:
        counter.watch = None
    try:
        yield
    finally:
        for counter, (forwards, backwards, watch) in zip(counters, before, strict=True):
            counter.forwards, counter.backwards, counter.watch = forwards, backwards, watch


class CountingEnsemble(CountingModel):
    """An ensemble that counts the images put through it; one pass is one of all its members."""

    @property
    def vote(self) -> str | None:
        return getattr(self.counted, "vote", None)

    counted: Any

    @property
    def probabilities(self) -> Tensor | None:
        """Return the members' probabilities of a randomized ensemble (`member_probabilities`), else ``None``."""
        return member_probabilities(self.counted)

    @property
    def own_ties(self) -> bool:
        """Tell whether an adopted ensemble breaks ties in a way of its own (`AdoptedEnsemble`)."""
        return getattr(self.counted, "own_ties", False)

    def _scores(self, outputs: Tensor) -> Tensor:
        return outputs if outputs.dim() == 2 else self.aggregate(outputs)

    def member_logits(self, x: Tensor) -> Tensor:
        return self._count(x, ask_members(self.counted, x))

    def aggregate(self, logits_MNK: Tensor) -> Tensor:
        return self.counted.aggregate(logits_MNK)


def count_passes(model: nn.Module, on_pass: Callable[[int], object] | None = None) -> CountingModel:
    """Wrap ``model`` so that its passes are counted; ``on_pass`` is called with the number of images of each pass."""
    return (CountingEnsemble if hasattr(model, "member_logits") else CountingModel)(model, on_pass)
