"""Read the options of an attack's name: ``mora?steps=10&targets=3``, ``apgd-ce?steps=20``, ``auto?steps=10``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from inspect import Parameter, signature
from typing import Any

from ensemble_attacks.attacks.record import NamedAttack
from ensemble_attacks.errors import unknown_name
from ensemble_attacks.names import options_in
from ensemble_attacks.validation import check_count

OF_THE_RUN = ("model", "norm", "eps", "seed", "batch_size", "eot_iter", "box", "mask")  # what an evaluation says itself
INNER, INSIDE = "attack", "inside"  # argument that makes the attack inside another; attribute of a maker that says which
OF_SUITES = {"steps": 0}  # of AutoAttack's own attacks, and of pipelines of several


def with_options(record: NamedAttack, name: str, query: str) -> NamedAttack:
    """Return the record of the attack ``name`` with the options of ``query``, ``key=value&key=value``.

    The options of this package's attacks are their arguments, but for those that an evaluation sets for all attacks; those
    of AutoAttack's own attacks, and of pipelines of several, are ``steps`` (`hosts.slots.shorten`).

    Raises:
        ValueError: Where an option is unknown; the message names the nearest one.
    """
    takes = OF_SUITES if record.make is None else _arguments(record.make)
    options: dict[str, Any] = {}
    for key, value in options_in(query).items():
        if key not in takes:
            raise unknown_name(f"option of the attack {name}", key, takes)
        options[key] = (value,) if isinstance(takes[key], tuple) and not isinstance(value, tuple) else value
    if record.make is None:
        check_count("steps", options["steps"])
        return replace(record, cost=None)
    return replace(record, make=partial(record.make, **options), cost=None)


def _arguments(make: Any) -> dict[str, Any]:
    """Return the arguments that may be options, with their defaults: also of the attack that one of another attack makes."""
    while isinstance(make, partial):
        make = make.func
    attack = getattr(make, "attack", lambda: make)()  # of this package, whose makers take any argument
    parameters = signature(attack).parameters
    found: dict[str, Any] = {}
    if INNER in parameters and any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        found = _arguments(getattr(make, INSIDE, lambda: parameters[INNER].default)())
    return found | {
        key: parameter.default
        for key, parameter in parameters.items()
        if key not in (*OF_THE_RUN, INNER) and parameter.default is not Parameter.empty
    }


def takes_steps(make: Any) -> bool:
    """Tell whether the attacks that a function makes have a number of steps."""
    return "steps" in _arguments(make)
