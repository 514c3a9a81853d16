"""One call of anybody's model: which module it is, what goes in, and what must come back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ensemble_attacks.models.held import modules_of
from ensemble_attacks.validation import (
    check_label_range,
    check_member_logits,
    check_probabilities,
    check_same_classes,
    check_scores,
)


class Function(nn.Module):
    """A function as a module, which holds the modules that the function stands on."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.owners = nn.ModuleList(_outermost(modules_of(function)))
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
            several = isinstance(model, (list, tuple)) and any(isinstance(part, nn.Module) for part in model)
            got = "several: as_ensemble([...], vote=...) makes them one" if several else repr(model)
            raise TypeError(f"model must be a torch.nn.Module or a function of images, got {got}"[:300])
        model = Function(model)
    if not hasattr(model, "training"):
        raise TypeError(f"model {type(model).__name__} is frozen, and has no training mode: pass it before torch.jit.freeze")
    check_alone(model)
    check_drawn(model)
    return model


def check_alone(model: nn.Module) -> None:
    """Raise a `TypeError` for a model that is, or holds, a wrapper whose forward is a collective operation, or without
    gradients, as it was made in inference mode."""
    for part in modules_of(model):
        if any(kind.__name__ in COLLECTIVE for kind in type(part).__mro__):
            raise TypeError(
                f"model is, or holds, a {type(part).__name__}, whose forward waits for other processes, while each needs as "
                "many passes as its own images do: pass its .module (of sharded parameters: gather them first)"
            )
    for parameter in (*model.parameters(), *model.buffers()):
        if is_lazy(parameter):
            raise TypeError(f"model {type(model).__name__} has parameters without a shape: run one forward pass first")
        if parameter.is_meta:
            raise TypeError(f"model {type(model).__name__} lies on the device 'meta': load its weights first")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise TypeError(
            f"model {type(model).__name__} was made in torch.inference_mode(), and has no gradients: make it outside, or "
            "pass copy.deepcopy(model), called outside"
        )


def member_probabilities(model: nn.Module) -> Tensor | None:
    """Return the probabilities, (M,), of a model that draws a member for each answer; ``None`` where it does not name them.

    Such a model has ``member_logits(x) -> (M, N, K)`` and ``probabilities``, (M,), that sum to 1.
    """
    probabilities = getattr(model, "probabilities", None)
    if not isinstance(probabilities, Tensor) or probabilities.dim() != 1 or not hasattr(model, "member_logits"):
        return None
    return probabilities


def check_drawn(model: nn.Module) -> None:
    """Raise a `ValueError` for a model that draws its members with numbers that are not probabilities."""
    probabilities = member_probabilities(model)
    if probabilities is not None:
        check_probabilities(probabilities, type(model).__name__)


COLLECTIVE = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")  # by name, as not every build has them


def _outermost(modules: list[nn.Module]) -> list[nn.Module]:
    """Return the modules that are no parts of others among them."""
    inner = {id(part) for module in modules for part in module.modules() if part is not module}
    return [module for module in modules if id(module) not in inner]


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
    return scores_NK if scores_NK.requires_grad else scores_NK.clone()  # it may write its next answer into the same memory


def ask_members(model: Any, x: Tensor) -> Tensor:
    """Return the logits of an ensemble's members, (M, N, K); otherwise as `ask`."""
    return _of_members(model.member_logits(x.clone()), len(x), type(model).__name__)


def ask_together(network: Callable[[Tensor], Any], x: Tensor, called: str) -> Tensor:
    """Return the logits (M, N, K) of members that one network computes together: these, or rows (M * N, K), of which the
    first N are the first member's; otherwise as `ask`."""
    answer = network(x.clone())
    if not isinstance(answer, (tuple, list)):
        answer = unwrapped(answer, called)
        if answer.dim() == 2 and len(x) < len(answer) and len(answer) % len(x) == 0:
            answer = answer.unflatten(0, (-1, len(x)))
    return _of_members(answer, len(x), called)


def _of_members(answer: Any, images: int, called: str) -> Tensor:
    logits_MNK = plain(answer)
    if isinstance(logits_MNK, (tuple, list)) and all(isinstance(one, Tensor) and one.dim() == 2 for one in logits_MNK):
        check_same_classes(logits_MNK, "member_logits")
        logits_MNK = torch.stack(list(logits_MNK))
    check_member_logits(logits_MNK, images, called)
    return logits_MNK if logits_MNK.requires_grad else logits_MNK.clone()


def ask_aggregate(aggregate: Callable[[Tensor], Any], logits_MNK: Tensor, called: str) -> Tensor:
    """Return the scores (N, K) that a user's ``aggregate`` makes of a copy of its members' logits; otherwise as `ask`."""
    scores_NK = unwrapped(aggregate(logits_MNK.clone()), called)
    check_scores(scores_NK, logits_MNK.shape[1], called)
    return scores_NK


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
    held = next(itertools.chain(model.parameters(), model.buffers()), None)
    return default if held is None else held.device


def moved(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Return the model, put on a device; where its parts lie on several, as it is."""
    return model if len(devices_of(model)) > 1 else model.to(device)


def devices_of(model: nn.Module) -> set[torch.device]:
    """Return the devices on which the model's parameters and buffers lie."""
    return {part.device for part in itertools.chain(model.parameters(), model.buffers())}


def beside(model: nn.Module, x: Tensor) -> Tensor:
    """Return ``x`` on the device where the model lies, of which others of its kind may be elsewhere."""
    return x.to(device_of(model, x.device))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` torch's default type within the context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Asked(nn.Module):
    """A model as a host's attack sees it: asked through `ask`, by images in float32 whatever it computes in.

    Hosts make their noise in float32, and would mix it with images of another type. Where they need this to be torch's
    default type (`default_dtype`), the model still finds the one that its user has set.
    """

    asks_itself = True  # what it is given, it passes on as a copy

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.asked, self.default = model, torch.get_default_dtype()
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        with default_dtype(self.default):
            scores_NK = ask(self.asked, x.to(precision(self.asked, x.dtype)))
        return scores_NK.to(x.dtype, copy=True)  # hosts write into it

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # members and parts, for attacks that look inside
            return getattr(super().__getattr__("asked"), name)
