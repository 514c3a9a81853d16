"""Attacks by name: this package's, torchattacks' (``torchattacks:PGD?steps=50``), and those that other packages register.

Another package registers an attack as an entry point of the group ``ensemble_attacks.attacks``: a name, and a torchattacks
``Attack`` class or any function of a model that makes one. Of ``norm``, ``eps``, ``seed``, ``batch_size`` and ``eot_iter``,
it is given those that it has as parameters.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any
from urllib.parse import parse_qsl

from torch import nn
from torchattacks.attack import Attack

from ensemble_attacks.attacks.a3 import A3
from ensemble_attacks.attacks.apgd import APGD, EOTAPGD
from ensemble_attacks.attacks.arc import ARC, check_probabilities
from ensemble_attacks.attacks.bpda import BPDAIdentity
from ensemble_attacks.attacks.caa import CAA
from ensemble_attacks.attacks.crossmax_transfer import CrossMaxTransfer
from ensemble_attacks.attacks.mora import MORA
from ensemble_attacks.attacks.pgd import PGD
from ensemble_attacks.attacks.reversal import FrontEndReversal
from ensemble_attacks.errors import unknown_name
from ensemble_attacks.models.parts import find_parts
from ensemble_attacks.models.surrogates import ZeroOrder

GROUP = "ensemble_attacks.attacks"
PEER = "torchattacks:"
EOT_ITER = 20  # draws of every iterate, where the user does not say


@dataclass(frozen=True, eq=False)
class NamedAttack:
    """How to make an attack of a model.

    Attributes:
        make: (model, norm, eps, seed, batch_size, eot_iter) -> a torchattacks ``Attack``.
        needs_members: it looks inside an ensemble.
        check: raises on a model that the attack cannot be run on.
    """

    make: Callable[..., Attack]
    summary: str
    needs_members: bool = False
    check: Callable[[nn.Module], object] = lambda model: None


def _ours(attack: Callable[..., Attack], /, **arguments: Any) -> Callable[..., Attack]:
    def make(model: nn.Module, *, eot_iter: int | None = None, **settings: Any) -> Attack:
        made: Any = attack(model, **settings, **arguments)
        made.eot_iter = eot_iter
        return made

    return make


def _eot(model: nn.Module, *, eot_iter: int | None = None, **settings: Any) -> Attack:
    return EOTAPGD(model, eot_iter=eot_iter or EOT_ITER, **settings)


def _zero_order(model: nn.Module, **settings: Any) -> Attack:
    return PGD(ZeroOrder(model), steps=20, n_restarts=1, **settings)


def _has_frontend(model: nn.Module) -> None:
    find_parts(model, "frontend")


OURS: dict[str, NamedAttack] = {
    "mora": NamedAttack(_ours(MORA), "MORA: five betas, 100 steps each", needs_members=True),
    "mora-mt": NamedAttack(
        _ours(MORA, targets=9), "MORA, then its multi-targeted stage: 9 targets x 100 steps", needs_members=True
    ),
    "pgd": NamedAttack(_ours(PGD), "PGD, 5 restarts x 100 steps of eps / 4, as the MORA paper runs it"),
    "cw": NamedAttack(_ours(PGD, loss="margin"), "CW (the margin of the logits), 5 restarts x 100 steps of eps / 4"),
    "a3": NamedAttack(_ours(A3), "A3 (Liu et al. 2022), 28 restarts of up to 60 steps"),
    "caa": NamedAttack(_ours(CAA), "CAA's Linf policy: 9 targets x (50 + 25), then 125 steps"),
    "eot-apgd": NamedAttack(_eot, "EOTAPGD: APGD of the mean over 20 draws (or --eot-iter), 100 steps"),
    "zero-order-pgd": NamedAttack(_ours(_zero_order), "PGD, 20 steps, on gradients estimated from 50 pairs of scores"),
    "bpda": NamedAttack(_ours(BPDAIdentity), "BPDAIdentity: APGD past the parts called frontend", check=_has_frontend),
    "bpda-mora": NamedAttack(
        _ours(BPDAIdentity, attack=MORA), "MORA past the parts called frontend", needs_members=True, check=_has_frontend
    ),
    "front-end-reversal": NamedAttack(
        _ours(FrontEndReversal),
        "APGD on what lies behind the part called frontend, carried back through it",
        check=_has_frontend,
    ),
    "crossmax-transfer": NamedAttack(
        _ours(CrossMaxTransfer), "APGD on the mean of the members' logits, refined on the model itself", needs_members=True
    ),
    "arc": NamedAttack(
        _ours(ARC), "ARC, 20 rounds over the members of a randomized ensemble", needs_members=True, check=check_probabilities
    ),
    "ea-apgd-ce": NamedAttack(_ours(APGD), "this package's APGD on cross-entropy, 100 steps"),
    "ea-apgd-dlr": NamedAttack(_ours(APGD, loss="dlr"), "this package's APGD on DLR, 100 steps"),
    "ea-apgd-t": NamedAttack(_ours(APGD, loss="dlr-targeted"), "this package's targeted APGD on DLR, 9 targets x 100 steps"),
}


HOSTS = {  # AutoAttack's own names, which nobody may take
    "apgd-ce": "AutoAttack's APGD on cross-entropy, 100 steps",
    "apgd-dlr": "AutoAttack's APGD on DLR, 100 steps",
    "apgd-t": "AutoAttack's targeted APGD on DLR, 9 targets x 100 steps",
    "fab": "AutoAttack's FAB, 100 steps",
    "fab-t": "AutoAttack's targeted FAB, 9 targets x 100 steps",
    "square": "AutoAttack's Square, 5000 queries",
}


@cache
def registered() -> dict[str, NamedAttack]:
    """The attacks of this package and of every installed package that registers some.

    Raises:
        ValueError: two have the same name.
    """
    found, owners = dict(OURS), dict.fromkeys([*OURS, *HOSTS], "ensemble-attacks")
    for entry in entry_points(group=GROUP):
        owner = entry.dist.name if entry.dist else entry.value
        if entry.name in owners:
            raise ValueError(f"attack {entry.name!r} is registered by both {owners[entry.name]} and {owner}: uninstall one")
        owners[entry.name] = owner
        found[entry.name] = NamedAttack(_adapted(entry.name, entry.load), f"{owner}'s")
    return found


def find_attack(name: str) -> NamedAttack:
    """The attack of that name; ValueError with the nearest one otherwise."""
    if name.startswith(PEER):
        return _peer(name)
    known = registered()
    if name not in known:
        raise unknown_name("attack", name, [*known, *HOSTS])
    return known[name]


def _adapted(name: str, load: Callable[[], Callable[..., Attack]], **options: Any) -> Callable[..., Attack]:
    """Makes an attack that may not know all of our settings; ``options`` go before them."""

    def make(model: nn.Module, *, norm: str, **settings: Any) -> Attack:
        attack = load()
        takes = inspect.signature(attack).parameters
        everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
        if "norm" not in takes and not everything and norm != _native_norm(name):
            raise ValueError(
                f"attack {name!r} has no parameter norm, and is taken for one in {_native_norm(name)}, not {norm}"
            )
        given = {key: value for key, value in (settings | {"norm": norm}).items() if value is not None}
        return attack(model, **{key: value for key, value in given.items() if everything or key in takes} | options)

    return make


def _native_norm(name: str) -> str:
    """Of an attack without a parameter for it: torchattacks' names say so, as in PGDL2."""
    return "L2" if name.upper().endswith("L2") else "Linf"


def _peer(name: str) -> NamedAttack:
    """One of torchattacks', with options: ``torchattacks:PGD?steps=50&alpha=0.002``.

    Raises:
        ValueError: no such attack or option.
    """
    import torchattacks

    kind, _, query = name.removeprefix(PEER).partition("?")
    kinds = [key for key, value in vars(torchattacks).items() if inspect.isclass(value) and issubclass(value, Attack)]
    if kind not in kinds:
        raise unknown_name("attack of torchattacks", kind, kinds)
    attack = getattr(torchattacks, kind)
    options = {key: _literal(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    takes = [key for key in inspect.signature(attack).parameters if key != "model"]
    for key in options:
        if key not in takes:
            raise unknown_name(f"option of torchattacks' {kind}", key, takes)
    return NamedAttack(_adapted(kind, lambda: attack, **options), f"torchattacks' {kind}")


def _literal(text: str) -> Any:
    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below) if slash else ast.literal_eval(text)
    except (ValueError, SyntaxError, ZeroDivisionError):
        return text
