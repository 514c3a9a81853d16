"""Find what a model or a function stands on: modules and random generators, wherever they are held."""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
DEPTH = 4  # steps from a module or a function to what it holds, through collections, functions and objects
MOST = 100_000  # things that are looked at
INTERNAL = frozenset(vars(nn.Module())) - {"training"}  # parameters, buffers and hooks
CLOSED = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, Tensor, np.ndarray, np.generic)


def held_by(*things: object) -> Iterator[nn.Module | Generator]:
    """Yield every module and random generator that things are, or hold, each once.

    They may be held as submodules and attributes, in lists and dictionaries, in closures and partials, by the objects that
    methods belong to, and as globals that a function names.
    """
    seen: set[int] = set()
    held = [(thing, 0) for thing in reversed(things)]
    while held and len(seen) < MOST:
        thing, depth = held.pop()
        if type(thing) in CLOSED or isinstance(thing, CLOSED) or id(thing) in seen:  # the first is quicker, and often true
            continue
        seen.add(id(thing))
        if isinstance(thing, (nn.Module, Generator)):
            yield thing
            depth = 0
        if depth < DEPTH:
            held += [(part, depth + 1) for part in reversed(_parts(thing))]


def _parts(thing: Any) -> list[Any]:
    """Return what a thing holds that may be, or hold, a module."""
    if isinstance(thing, nn.Module):
        own = [value for name, value in vars(thing).items() if name not in INTERNAL]
        return [*own, *thing._modules.values()]
    if isinstance(thing, Generator):
        return []
    if isinstance(thing, Mapping):
        return list(thing.values())
    if isinstance(thing, (list, tuple, set, frozenset)):
        return list(thing)
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    bound = [getattr(thing, name, None) for name in ("__self__", "__func__", "__wrapped__")]
    if (code := getattr(thing, "__code__", None)) is not None:
        return [
            *bound,
            *closed_over(thing),
            *(thing.__globals__[name] for name in code.co_names if name in thing.__globals__),
        ]
    return [*bound, *getattr(thing, "__dict__", {}).values()]


def closed_over(function: Any) -> list[Any]:
    """Return what a function closes over."""
    return [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _filled(cell)]


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is bound later
        return False


def modules_of(*things: object) -> list[nn.Module]:
    """Return every module that things are, or hold, each once."""
    return [thing for thing in held_by(*things) if isinstance(thing, nn.Module)]


def generators_of(*things: object) -> list[Generator]:
    """Return every random generator that things are, or hold, each once."""
    return [thing for thing in held_by(*things) if isinstance(thing, Generator)]
