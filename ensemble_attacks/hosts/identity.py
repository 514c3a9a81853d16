"""Describe what decides the result of a run, so that a stored state is only gone on with by the same run."""

from __future__ import annotations

import functools
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from ensemble_attacks.files import digest
from ensemble_attacks.hosts.slots import SLOTS, is_original
from ensemble_attacks.models.held import closed_over

ATTACKED = "the attacked model"
SIMPLE = (type(None), bool, int, float, str)
FOUND = ("_attacks", "device", "model_name", "ndims", "orig_dim", "premise", "target_class", "trace", "y_target", "verbose")
# attributes of attacks that say what was found, or how much is printed, and decide nothing


def described(thing: object, attacked: Sequence[nn.Module] = (), _around: tuple[int, ...] = ()) -> Any:
    """Return, as JSON can hold it, all of a thing that decides a result.

    Attacks, dataclasses and functions are described by what they hold, modules and tensors by their content, the rest by
    its type.

    Args:
        thing: whatever an attack may hold.
        attacked: the model of the run, and what else stands for it.
    """
    if isinstance(thing, SIMPLE):
        return repr(thing) if isinstance(thing, float) and not math.isfinite(thing) else thing
    if isinstance(thing, Tensor):
        return digest(thing)
    if isinstance(thing, np.generic):
        return described(thing.item(), attacked, _around)
    if isinstance(thing, np.ndarray) and thing.dtype != object:
        return digest(str(thing.dtype), thing.shape, thing.tobytes().hex())
    if isinstance(thing, (torch.dtype, torch.device, range, complex, bytes, Path, Enum)):
        return repr(thing)
    if any(thing is model for model in attacked):
        return ATTACKED
    if id(thing) in _around:
        return "itself"

    def of(part: object) -> Any:
        return described(part, attacked, (*_around, id(thing)))

    if isinstance(thing, nn.Module):
        return _module(thing, of)
    if isinstance(thing, Attack):
        return {"class": _name(type(thing)), **_attributes(thing, of)}
    if isinstance(thing, Mapping):
        return {str(key): of(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [of(part) for part in thing]
    if isinstance(thing, (set, frozenset)):
        return sorted(str(of(part)) for part in thing)
    if is_dataclass(thing) and not isinstance(thing, type):
        given = {field.name: of(getattr(thing, field.name)) for field in fields(thing) if field.init}  # others are derived
        return {"class": _name(type(thing)), **given}
    if isinstance(thing, functools.partial):
        return {"function": of(thing.func), "args": of(thing.args), "keywords": of(thing.keywords)}
    if isinstance(thing, types.MethodType):
        return {"function": of(thing.__func__), "of": of(thing.__self__)}
    if isinstance(thing, types.FunctionType):
        return _function(thing, of)
    if not isinstance(thing, type) and getattr(thing, "__dict__", None):
        return {"class": _name(type(thing)), **{str(key): of(value) for key, value in vars(thing).items()}}
    return _name(thing if isinstance(thing, type) else type(thing))


def of_slot(adversary: Any, name: str, attacked: Sequence[nn.Module]) -> Any:
    """Describe one of the original's attacks, but for what its loop sets before every use."""
    slot, loops_own = SLOTS[name]
    attack = getattr(adversary, slot)
    if not is_original(attack):
        return described(attack, attacked)
    shown = {key: value for key, value in vars(attack).items() if isinstance(value, (*SIMPLE, list, tuple, np.generic))}
    return {key: described(value) for key, value in shown.items() if key not in {*loops_own, *FOUND, "seed"}}


def difference(stored: Any, now: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Return where two descriptions differ first, and what each has there; ``None`` where they are the same."""
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in {**stored, **now}:
            found = difference(stored.get(key), now.get(key), f"{where}.{key}" if where else str(key))
            if found:
                return found
        return None
    return None if stored == now else (where, stored, now)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _attributes(thing: object, of: Any) -> dict[str, Any]:
    return {key: of(value) for key, value in vars(thing).items() if key not in FOUND}


def _module(module: nn.Module, of: Any) -> Any:
    """Describe a module: its parts' kinds and settings, and the content of its state."""
    parts = {
        name: {
            "class": _name(type(part)),
            **{
                key: of(value)
                for key, value in vars(part).items()
                if not key.startswith("_") and key != "training" and not isinstance(value, nn.Module)
            },
        }
        for name, part in module.named_modules()
    }
    return {"parts": digest(parts), "state": digest(*_flat(module.state_dict().items()))}


def _flat(items: Iterable[tuple[str, Any]]) -> Iterable[Any]:
    return (part for item in items for part in item)


def _function(function: types.FunctionType, of: Any) -> Any:
    held = [of(value) for value in closed_over(function)]
    return {
        "name": f"{function.__module__}.{function.__qualname__}",
        "code": _code(function.__code__),
        "defaults": of([function.__defaults__, function.__kwdefaults__]),
        "held": held,
    }


def _code(code: types.CodeType) -> str:
    """Return the hash of what a function does, whatever address it lies at."""
    constants = [_code(one) if isinstance(one, types.CodeType) else repr(one) for one in code.co_consts]
    return digest(code.co_code.hex(), re.sub(r" at 0x[0-9a-f]+", "", str(constants)), code.co_names)
