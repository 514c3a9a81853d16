"""Find parts of a model by name, and put the identity in their place in the backward pass (BPDA; Athalye, Carlini & Wagner,
"Obfuscated Gradients Give a False Sense of Security", ICML 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.devices import numbers
from ensemble_attacks.errors import PartError
from ensemble_attacks.models.ask import ask
from ensemble_attacks.models.guard import guarded


class _Identity(torch.autograd.Function):
    """A function ``(x, f(x)) -> f(x)`` that passes the gradient on to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def find_parts(model: nn.Module, parts: str | nn.Module | Sequence[str | nn.Module]) -> list[tuple[str, nn.Module]]:
    """Return the parts of a model, with their names: every submodule that is given, or whose name is or ends in one given.

    Raises:
        PartError: Where nothing is called so; the message lists what there is.
    """
    chosen: Iterable[str | nn.Module] = [parts] if isinstance(parts, (str, nn.Module)) else parts
    known = {name: module for name, module in model.named_modules() if name}
    found: dict[str, nn.Module] = {}
    for part in chosen:
        matches = {
            name: module
            for name, module in known.items()
            if module is part or (isinstance(part, str) and (name == part or name.endswith(f".{part}")))
        }
        if not matches:
            what = repr(part) if isinstance(part, str) else f"the given {type(part).__name__}"
            raise PartError(f"parts: {what} is no part of {type(model).__name__}: choose from {', '.join(known) or 'none'}")
        found |= matches
    if not found:
        raise PartError("parts is empty: name at least one part of the model")
    return list(found.items())


@contextmanager
def straight_through(model: nn.Module, parts: str | nn.Module | Sequence[str | nn.Module]) -> Iterator[None]:
    """Make the backward pass of these parts the identity within the context; afterwards, whatever happens, all is as before.

    Raises:
        PartError: Where there is no such part, or, in a forward pass, where one changes the shape of what goes through it.
    """

    def pass_through(name: str, x: Tensor, y: Tensor) -> Tensor:
        return _Identity.apply(x, y)  # type: ignore[no-untyped-call, no-any-return]

    with _hooked(model, parts, pass_through):
        yield


@contextmanager
def _hooked(
    model: nn.Module,
    parts: str | nn.Module | Sequence[str | nn.Module],
    see: Callable[[str, Tensor, Tensor], Tensor | None],
) -> Iterator[None]:
    """Call ``see`` with the name, input and output of each part within the context; what it returns replaces the output."""

    came_in: list[Tensor] = []  # of the parts that are being called, the outermost first

    def copied(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> tuple[Any, Any]:
        """Give a part a copy of what comes in, into which it may write."""
        given = [*inputs, *named.values()]
        if not given or not isinstance(given[0], Tensor):
            kind = type(given[0]).__name__ if given else "nothing"
            raise PartError(f"parts: a {type(module).__name__} is given {kind}: name parts that take one tensor first")
        came_in.append(given[0])
        if inputs:
            return (inputs[0].clone(), *inputs[1:]), named
        first, *_ = named
        return inputs, named | {first: named[first].clone()}

    def hook(name: str) -> Callable[..., Tensor | None]:
        def call(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor | None:
            x = came_in.pop()
            check_output(name, output)
            if output.shape != x.shape:
                raise PartError(
                    f"parts: {name!r} turns {tuple(x.shape)} into {tuple(output.shape)}, so that the identity cannot stand "
                    "in for it: name parts that keep the shape"
                )
            return see(name, x, output)

        return call

    with ExitStack() as stack:
        for name, module in find_parts(model, parts):
            stack.callback(module.register_forward_pre_hook(copied, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(hook(name), with_kwargs=True).remove)
        yield


def check_output(name: str, output: object) -> None:
    """Raise a `PartError` unless a part returned one tensor."""
    if not isinstance(output, Tensor):
        raise PartError(f"parts: {name!r} returns a {type(output).__name__}: name parts that return one tensor")


def not_called(names: Sequence[str]) -> PartError:
    """Return the `PartError` that tells of parts which a forward pass does not call."""
    return PartError(
        f"parts: the forward pass does not call {', '.join(map(repr, names))} as a module (a call of its .forward does not "
        "count): name what it calls"
    )


def premise(
    model: nn.Module, parts: str | nn.Module | Sequence[str | nn.Module], x: Tensor, labels: Tensor
) -> dict[str, dict[str, float] | float]:
    """Measure how far BPDA-identity may be trusted: how near each part is to the identity on images (N, C, H, W).

    Returns:
        For each part ``relative``, the mean of ``|f(x) - x|_2 / |x|_2``, and ``largest``, that of ``|f(x) - x|_inf``; and
        ``gradient_cosine``, the mean cosine between the input gradients of the cross-entropy with and without the parts' own
        backward pass, and ``gradient_ratio``, the median ratio of their lengths. A low cosine is not a failure: it is what a
        defense that masks its gradient looks like. Where a part stops the gradient, both are 0.

    Raises:
        PartError: Where there is no such part, none that the forward pass calls, or one that changes the shape.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, before: Tensor, after: Tensor) -> None:
        seen[name] = (before.detach().flatten(1), after.detach().flatten(1))

    def gradient() -> Tensor:
        images = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(ask(model, images), labels, reduction="sum")
            (slope,) = torch.autograd.grad(loss, images, allow_unused=True) if loss.requires_grad else (None,)
        return (torch.zeros_like(images) if slope is None else slope).flatten(1)

    with guarded(model):
        with _hooked(model, parts, keep):
            own = gradient()
        if not seen:
            raise not_called([name for name, _ in find_parts(model, parts)])
        with straight_through(model, parts):
            surrogate = gradient()
    relative = [
        ((after - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-12)).mean() for before, after in seen.values()
    ]
    largest = [(after - before).abs().amax(1).mean() for before, after in seen.values()]
    cosine = nn.functional.cosine_similarity(own, surrogate).mean()
    ratio = (own.norm(dim=1) / surrogate.norm(dim=1).clamp_min(1e-30)).median()
    gradient_cosine, gradient_ratio, *of_parts = numbers([cosine, ratio, *relative, *largest])
    figures: dict[str, dict[str, float] | float] = {
        name: {"relative": near, "largest": far}
        for name, near, far in zip(seen, of_parts[: len(seen)], of_parts[len(seen) :], strict=True)
    }
    return figures | {"gradient_cosine": gradient_cosine, "gradient_ratio": gradient_ratio}
