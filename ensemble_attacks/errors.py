"""Define errors that a user can act on: each message names the argument, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NotAnEnsembleError(TypeError):
    """An error that is raised where an attack needs the members of an ensemble and the model does not show any."""


class AggregateMismatchError(ValueError):
    """An error that is raised where the claimed members and vote do not reproduce the model's own predictions."""


class OutOfBallError(ValueError):
    """An error that is raised where an image leaves the threat model's ball or the box of the images, or is not finite."""


class PartError(ValueError):
    """An error that is raised where a model has no such part, or the part does not suit what is asked of it."""


class WeightsError(ValueError):
    """An error that is raised where a weights file or checkpoint is not what its card, or its name, says it is."""


class LedgerError(RuntimeError):
    """An error that is raised where a run's folder cannot be used: damaged, not writable, unfinished, or of another run."""


class MissingExtraError(ImportError):
    """An error that is raised where a package is missing that is an extra; the message has the command that installs it."""


class AttackFailedError(RuntimeError):
    """An error that is raised where no attack of a pipeline could be run to its end; the message says why, of each."""


OUT_OF_MEMORY = (  # as allocators and libraries of kernels say it
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "unable to allocate",
    "bad_alloc",
    "could not create a primitive",  # oneDNN
    "alloc_failed",  # cuBLAS, cuDNN
)


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says, in any words, that memory ran out, no fault of an attack's: a smaller batch may do."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"MemoryError", "OutOfMemoryError"}:
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error).lower() for words in OUT_OF_MEMORY)


def reason(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says, for one line of a summary."""
    if isinstance(error, AttackFailedError) and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


def none_completed(errors: dict[str, Exception]) -> Exception:
    """Return what is raised where all attacks failed, by name: the first error if it tells of unusable arguments."""
    first = next(iter(errors.values()))
    if isinstance(first, (TypeError, ValueError, AttackFailedError)):
        return first
    said = "; ".join(f"{name}: {reason(error)}" for name, error in errors.items())
    failed = AttackFailedError(f"no attack could be run to its end: {said}")
    failed.__cause__ = first
    return failed


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """Return a `ValueError` for a name that is not registered, which tells the nearest one that is."""
    known = sorted(known)
    by_case = {one.lower(): one for one in known}
    nearest = difflib.get_close_matches(str(name).lower(), by_case, n=1, cutoff=0.4)
    hint = f"did you mean {by_case[nearest[0]]!r}? " if nearest else ""
    return ValueError(f"unknown {kind} {name!r}: {hint}known: {', '.join(known)}")


def said(error: BaseException, limit: int = 300) -> str:
    """Return the kind of an error and what it says, on one line of at most ``limit`` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")
    return text if len(text) <= limit else f"{text[:limit]}..."


def plain(text: object) -> str:
    """Return text that others chose so that a terminal shows it: nothing in it moves a cursor, colours, or reorders."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
