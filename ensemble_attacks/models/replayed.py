"""Prepare gradient passes of a deterministic model once, for batches of a few sizes: recorded as CUDA graphs, or compiled.

A batch is padded to the next size. All else that the model is asked, without a gradient, goes to it as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ensemble_attacks.models.ask import ask, ask_members
from ensemble_attacks.models.preserve import differentiable

Pass = Callable[[Tensor], Tensor]  # images (N, ...) -> scores (N, K), or members' logits (M, N, K)
WARMING = 3  # passes before a recording, in which libraries choose their kernels
BACKEND = "inductor"  # of torch.compile


class Recording:
    """A forward and a backward pass of images of one shape that a CUDA device has been told once, and does again.

    Every replay computes in the same memory: what it leaves there is copied, and a backward pass consumes what the forward
    pass has left. So a forward pass is done again for a further backward pass, or where others came between.

    Args:
        asked: what the model answers, of images.
        x: images of the shape, on a CUDA device.

    Raises:
        RuntimeError: Where the model makes the host wait, or does what cannot be recorded otherwise.
    """

    def __init__(self, asked: Pass, x: Tensor) -> None:
        self.x = x.detach().clone().requires_grad_()
        with torch.cuda.device(x.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARMING):
                    scores = asked(self.x)
                    torch.autograd.grad(scores.sum(), self.x)
            torch.cuda.current_stream().wait_stream(aside)
            self.by_scores = torch.zeros_like(scores)
            self._forwards, self._backwards = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._forwards):
                self.scores = asked(self.x)
            with torch.cuda.graph(self._backwards, pool=self._forwards.pool()):
                (self.gradient,) = torch.autograd.grad(self.scores, self.x, self.by_scores)
        self.scores = self.scores.detach()
        self.turn = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of images of the recorded shape."""
        self.x.detach().copy_(x)
        self._forwards.replay()
        self.turn += 1
        return self.scores.clone()

    def backward(self, by_scores: Tensor) -> Tensor:
        """Return the gradient with respect to the last images, from that with respect to their scores."""
        self.by_scores.copy_(by_scores)
        self._backwards.replay()
        self.turn += 1
        return self.gradient.clone()


class _Replayed(torch.autograd.Function):
    """A function of images that replays a recording."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recording: Recording) -> Tensor:
        ctx.save_for_backward(x)
        ctx.recording, scores = recording, recording.forward(x)
        ctx.turn = recording.turn
        return scores

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, by_scores: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if ctx.turn != ctx.recording.turn:
            ctx.recording.forward(*ctx.saved_tensors)
        return ctx.recording.backward(by_scores), None


def _replay(recording: Recording, x: Tensor) -> Tensor:
    return _Replayed.apply(x, recording)  # type: ignore[no-untyped-call]


def can_record(x: Tensor) -> bool:
    """Tell whether the device of images can replay what it was told."""
    return x.is_cuda


def record(asked: Pass, x: Tensor) -> Pass:
    """Return what answers as ``asked`` does of images of the shape of ``x``, by a `Recording`."""
    return partial(_replay, Recording(asked, x))


def compile_for(asked: Pass, x: Tensor) -> Pass:
    """Return ``asked``, compiled for images of the shape of ``x``; on a CUDA device it is recorded, too."""
    answers: Pass = torch.compile(asked, backend=BACKEND, dynamic=False)
    images = x.detach().clone().requires_grad_()
    torch.autograd.grad(answers(images).sum(), images)  # it compiles what it is called with
    return record(answers, x) if can_record(x) else answers


class Padded(nn.Module):
    """A model, images (N, ...) -> scores (N, K), whose gradient passes are prepared for batches of some sizes.

    Args:
        model: what answers; deterministic, in eval mode, and each image for itself.
        x: a batch of images, on the model's device, of the largest size.
        prepare: what prepares a pass (`record`, `compile_for`).
        halvings: how often the batch is halved for further sizes.

    Attributes:
        least: the share of a size that a batch has at least, for which it is padded.
    """

    asks_itself = True  # as of `Asked`
    asked: Any = staticmethod(ask)
    along = 0  # the dimension of what is answered that counts images

    def __init__(self, model: nn.Module, x: Tensor, prepare: Callable[[Pass, Tensor], Pass], halvings: int = 0) -> None:
        super().__init__()
        self.inner: Any = model
        self.training, self.least = model.training, 0.0
        self.kind = x.shape[1:], x.dtype, x.device
        sizes = {-(-len(x) // 2**halving) for halving in range(halvings + 1)}
        with differentiable():
            self.passes = {size: prepare(partial(self.asked, model), x[:size]) for size in sorted(sizes)}

    def forward(self, x: Tensor) -> Tensor:
        return self._answer(x)

    def _answer(self, x: Tensor) -> Tensor:
        size = next((size for size in self.passes if len(x) <= size), 0)
        prepared = x.requires_grad and torch.is_grad_enabled() and not self.inner.training
        if not prepared or len(x) <= self.least * size or not size or (x.shape[1:], x.dtype, x.device) != self.kind:
            return self.asked(self.inner, x)
        more = x[-1:].detach().expand(size - len(x), *x.shape[1:])
        return self.passes[size](torch.cat([x, more])).narrow(self.along, 0, len(x))


class PaddedEnsemble(Padded):
    """An ensemble whose members' gradient passes are prepared, all in one."""

    asked = staticmethod(ask_members)
    along = 1

    @property
    def vote(self) -> Any:
        return getattr(self.inner, "vote", None)

    def member_logits(self, x: Tensor) -> Tensor:
        return self._answer(x)

    def aggregate(self, logits_MNK: Tensor) -> Tensor:
        return self.inner.aggregate(logits_MNK)

    def forward(self, x: Tensor) -> Tensor:
        return self.aggregate(self._answer(x))


def padded(model: nn.Module, x: Tensor, prepare: Callable[[Pass, Tensor], Pass], halvings: int = 0) -> Padded:
    """Return a model with prepared passes (`Padded`); an ensemble shows its members."""
    return (PaddedEnsemble if hasattr(model, "member_logits") else Padded)(model, x, prepare, halvings)
