"""Errors that a user can act on: each message names the argument, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NotAnEnsembleError(TypeError):
    """The attack needs the members of an ensemble and the model does not show any."""


class AggregateMismatchError(ValueError):
    """The claimed members and vote do not reproduce the model's own predictions."""


class OutOfBallError(ValueError):
    """An image that claims to be adversarial lies outside the threat model's ball or the [0, 1] box."""


class PartError(ValueError):
    """No such part of the model, or one that the identity cannot stand in for."""


class WeightsError(ValueError):
    """A weights file that is not what the registry says it is."""


class LedgerError(RuntimeError):
    """A run's folder that cannot be used: damaged, not writable, or of another run."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """A ValueError for a name that is not registered, with the nearest one that is."""
    known = sorted(known)
    by_case = {one.lower(): one for one in known}
    nearest = difflib.get_close_matches(str(name).lower(), by_case, n=1, cutoff=0.4)
    hint = f"did you mean {by_case[nearest[0]]!r}? " if nearest else ""
    return ValueError(f"unknown {kind} {name!r}: {hint}known: {', '.join(known)}")
