"""Make the attacks of others by their names, with options: ``torchattacks:PGD?steps=50&alpha=0.002``."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from ensemble_attacks.attacks.record import NamedAttack
from ensemble_attacks.errors import unknown_name
from ensemble_attacks.names import literal

if TYPE_CHECKING:
    from torch import nn
    from torchattacks.attack import Attack

logger = logging.getLogger(__name__)
PEER = "torchattacks:"
NOT_BY_NAME = {  # attacks of torchattacks that want more than a model, and where to go
    "MultiAttack": "it takes attacks, not a model: name these one after another, or pass an instance",
    "LGV": "it trains the model further, on a loader of training images: pass an instance",
    "Attack": "it is the base of all: name one of them",
}


def adapted(name: str, load: Callable[[], Callable[..., Attack]], **options: Any) -> Callable[..., Attack]:
    """Return a function that makes an attack that may not know all of our settings; ``options`` override them."""

    def make(model: nn.Module, *, norm: str, **settings: Any) -> Attack:
        attack = load()
        takes = inspect.signature(attack).parameters
        everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
        if "norm" not in takes and not everything and norm != _native_norm(name):
            raise ValueError(
                f"attack {name!r} has no parameter norm, and is taken for one in {_native_norm(name)}, not {norm}"
            )
        alpha, eps = takes["alpha"].default if "alpha" in takes else None, settings.get("eps")
        if "alpha" not in options and isinstance(alpha, float) and isinstance(eps, (int, float)) and alpha >= eps:
            _tell_step(name, alpha, float(eps))
        given = {key: value for key, value in (settings | {"norm": norm}).items() if value is not None}
        return attack(model, **{key: value for key, value in given.items() if everything or key in takes} | options)

    return make


@cache
def _tell_step(name: str, alpha: float, eps: float) -> None:
    """Log, once, that the default step of an attack is as large as the ball: it then jumps from side to side."""
    logger.warning(
        "%s%s takes steps of alpha = %.3g by default, as large as the ball (eps = %.3g): give them, %s%s?alpha=%.2g",
        *(PEER, name, alpha, eps, PEER, name, eps / 4),
    )


def _native_norm(name: str) -> str:
    """Return the norm of an attack without a parameter for it: L2 where its name ends so, as in PGDL2, else Linf."""
    return "L2" if name.upper().endswith("L2") else "Linf"


def peer(name: str) -> NamedAttack:
    """Return the record of an attack of torchattacks, with options: ``torchattacks:PGD?steps=50&alpha=0.002``.

    Raises:
        ValueError: Where there is no such attack or option, or it wants more than a model (`NOT_BY_NAME`).
    """
    import torchattacks
    from torchattacks.attack import Attack

    kind, _, query = name.removeprefix(PEER).partition("?")
    kinds = [key for key, value in vars(torchattacks).items() if inspect.isclass(value) and issubclass(value, Attack)]
    if kind not in kinds:
        raise unknown_name("attack of torchattacks", kind, kinds)
    if kind in NOT_BY_NAME:
        raise ValueError(f"attack {PEER + kind!r} cannot be had by its name: {NOT_BY_NAME[kind]}")
    attack = getattr(torchattacks, kind)
    options = {key: literal(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    takes = [key for key in inspect.signature(attack).parameters if key != "model"]
    for key in options:
        if key not in takes:
            raise unknown_name(f"option of torchattacks' {kind}", key, takes)
        _check_option(kind, key, options[key], inspect.signature(attack).parameters[key].default)
    return NamedAttack(f"torchattacks' {kind}", adapted(kind, lambda: attack, **options))


def _check_option(kind: str, key: str, value: Any, default: Any) -> None:
    """Raise a `ValueError` where an option is of another kind than its default: a number, a truth value, a text."""
    kinds = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}.get(type(default))
    if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
        raise ValueError(f"option {key} of torchattacks' {kind} is {value!r:.60}: expected one like {default!r}")
    if isinstance(value, (int, float)) and not abs(value) < 1e30:
        raise ValueError(f"option {key} of torchattacks' {kind} is {value!r:.60}: expected a finite number")
