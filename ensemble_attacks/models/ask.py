"""One call of anybody's model: which module it is, what goes in, and what must come back."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.validation import check_label_range, check_member_logits, check_same_classes, check_scores


class Function(nn.Module):
    """A function as a module, which holds the modules that the function stands on."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.owners = nn.ModuleList(_owners(function))
        self.training = any(owner.training for owner in self.owners)

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def as_module(model: object) -> nn.Module:
    """Return the model as a module that can be asked by one process alone.

    A bound ``forward`` is the module that it belongs to; another function becomes a `Function` with the modules that it
    stands on: the one that it is bound to, those that it closes over, those that a ``functools.partial`` holds.

    Raises:
        TypeError: Where it is neither a module nor a function, a frozen scripted module, which has no training mode, a
            wrapper whose forward is a collective operation of several processes, or made in inference mode.
    """
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module) and getattr(model, "__name__", "") in ("forward", "__call__", "_wrapped_call_impl"):
        model = owner
    if not isinstance(model, nn.Module):
        if not callable(model) or isinstance(model, type):
            raise TypeError(f"model must be a torch.nn.Module or a function of images, got {model!r}"[:300])
        model = Function(model)
    if not hasattr(model, "training"):
        raise TypeError(f"model {type(model).__name__} is frozen, and has no training mode: pass it before torch.jit.freeze")
    check_alone(model)
    return model


def check_alone(model: nn.Module) -> None:
    """Raise a `TypeError` for a model that is, or holds, a wrapper whose forward is a collective operation, or without
    gradients, as it was made in inference mode."""
    for part in model.modules():
        if any(kind.__name__ in COLLECTIVE for kind in type(part).__mro__):
            raise TypeError(
                f"model is, or holds, a {type(part).__name__}, whose forward waits for other processes, while each needs as "
                "many passes as its own images do: pass its .module (of sharded parameters: gather them first)"
            )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise TypeError(
            f"model {type(model).__name__} was made in torch.inference_mode(), and has no gradients: make it outside, or "
            "pass copy.deepcopy(model), called outside"
        )


COLLECTIVE = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")  # by name, as not every build has them


def _owners(function: object) -> Iterator[nn.Module]:
    """Yield the modules that a function stands on, each once."""
    found: dict[int, nn.Module] = {}
    held: list[Any] = [getattr(function, "__self__", None)]
    if isinstance(function, functools.partial):
        held += [function.func, *function.args, *function.keywords.values()]
    held += [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _filled(cell)]
    code, globals_ = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    held += [globals_[name] for name in getattr(code, "co_names", ()) if name in globals_]
    for value in held:
        if isinstance(value, nn.Module):
            found[id(value)] = value
        elif isinstance(getattr(value, "__self__", None), nn.Module):
            found[id(value.__self__)] = value.__self__
        elif isinstance(value, functools.partial):
            found |= {id(module): module for module in _owners(value)}
    yield from found.values()


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is bound later
        return False


def ask(model: Callable[[Tensor], Any], x: Tensor, called: str | None = None) -> Tensor:
    """Return the scores (N, K) of a model, ``called`` so in errors, of images (N, ...), with a copy of which it may do as it
    likes.

    Where it returns more than one tensor, the scores are what is called ``logits``, or the only tensor that there is.

    Raises:
        TypeError, ValueError: Where it returns something else; says what, and the remedy.
    """
    called = called or type(model).__name__
    scores_NK = unwrapped(model(x if getattr(model, "asks_itself", False) else x.clone()), called)
    check_scores(scores_NK, len(x), called)
    return scores_NK


def ask_members(model: Any, x: Tensor) -> Tensor:
    """Return the logits of an ensemble's members, (M, N, K); otherwise as `ask`."""
    logits_MNK = plain(model.member_logits(x.clone()))
    if isinstance(logits_MNK, (tuple, list)) and all(isinstance(one, Tensor) and one.dim() == 2 for one in logits_MNK):
        check_same_classes(logits_MNK, "member_logits")
        logits_MNK = torch.stack(list(logits_MNK))
    check_member_logits(logits_MNK, len(x), type(model).__name__)
    return logits_MNK


def unwrapped(answer: Any, called: str) -> Tensor:
    """Return the one obvious tensor of what a model returned.

    Raises:
        TypeError: Where there is none; says what the model returns, and the remedy.
    """
    if isinstance(answer, Tensor):
        return plain(answer)
    logits = answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", None)
    if isinstance(logits, Tensor):
        return plain(logits)
    values = list(answer.values()) if isinstance(answer, Mapping) else answer if isinstance(answer, (tuple, list)) else []
    if len(values) == 1 and isinstance(values[0], Tensor):
        return plain(values[0])
    kind = type(answer).__name__
    raise TypeError(f"model {called} returns a {kind}: wrap it so that it returns its scores alone, one tensor (N, K)")


def plain(tensor: Any) -> Any:
    """Return a tensor of a subclass that only carries something along as a plain one."""
    kind = type(tensor)
    if kind is Tensor or not isinstance(tensor, Tensor) or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return tensor
    return tensor.as_subclass(Tensor)


@torch.no_grad()
def classes_of(model: Callable[[Tensor], Any], x: Tensor, labels: Tensor | None = None) -> int:
    """Return how many classes the model has, by what it answers on the first image by itself, and on the first two.

    Raises:
        TypeError, ValueError: Where the answers are no scores, or ``labels`` hold a class that has none.
    """
    alone, together = (ask(model, x[:few]).shape[1] for few in (1, 2))
    if alone != together:
        raise ValueError(
            f"model {type(model).__name__} scores {alone} classes of one image, and {together} of two: expected (N, K)"
        )
    if labels is not None:
        check_label_range(labels, alone, "y")
    return alone


@torch.no_grad()
def check_dtype(model: nn.Module, images: Tensor, name: str = "images") -> None:
    """Raise a TypeError unless images have the type that the model computes in, or the model converts them itself."""
    own = precision(model, images.dtype)
    if own == images.dtype or not len(images):
        return
    try:
        model(images[:1].to(device_of(model, images.device), copy=True))
    except RuntimeError as error:
        raise TypeError(f"{name} has dtype {images.dtype}, the model {own}: pass {name}.to({own})") from error


def precision(model: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the type that the model computes in: that of its first floating-point parameter, or ``default``."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), default)


def device_of(model: nn.Module, default: torch.device) -> torch.device:
    """Return the device of the model's first parameter or buffer, or ``default``."""
    held: list[Tensor] = [*itertools.islice(model.parameters(), 1), *itertools.islice(model.buffers(), 1)]
    return held[0].device if held else default


class Asked(nn.Module):
    """A model as a host's attack sees it: asked through `ask`, by images in float32 whatever it computes in.

    Hosts make their noise in float32, and would mix it with images of another type.
    """

    asks_itself = True  # what it is given, it passes on as a copy

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.asked = model
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        scores_NK = ask(self.asked, x.to(precision(self.asked, x.dtype)))
        return scores_NK.to(x.dtype, copy=True)  # hosts write into it

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # members and parts, for attacks that look inside
            return getattr(super().__getattr__("asked"), name)
