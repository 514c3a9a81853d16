"""Examine the whole installation: versions, and a trial import of each host."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module

from ensemble_attacks.errors import said
from ensemble_attacks.extras import import_timm
from ensemble_attacks.hosts.doctor import BROKEN, OK, Finding, compare_requirements, examine, installed
from ensemble_attacks.hosts.original import installed_autoattack
from ensemble_attacks.hosts.robustbench import ensure


def examine_all() -> list[Finding]:
    """Return what is found of the whole installation."""
    trials: dict[str, Callable[[], object]] = {
        "torchattacks": lambda: import_module("torchattacks"),
        "AutoAttack": installed_autoattack,
    }
    if importlib.util.find_spec("timm"):
        trials["timm"] = lambda: import_timm("timm:NAME")
    if installed("robustbench"):
        trials["robustbench"] = ensure
    return [*compare_requirements(), *examine(), *(_trial(name, load) for name, load in trials.items())]


def _trial(name: str, load: Callable[[], object]) -> Finding:
    """Import a host, silently, and return whether that succeeds."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load()
    except (Exception, SystemExit) as error:  # whatever an import raises
        return Finding(f"import of {name}", BROKEN, said(error))
    way = " (through ensemble_attacks.robustbench.ensure())" if name == "robustbench" else ""
    return Finding(f"import of {name}", OK, f"succeeds{way}")
