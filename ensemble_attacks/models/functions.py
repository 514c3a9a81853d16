"""Make models of what a user's functions return.

A function returns a module, or a module and a dictionary of what is known of it: ``members`` and ``vote``, as of
`as_ensemble`, and ``dataset``, the name of the data that it is evaluated on unless another is named.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ensemble_attacks import sources
from ensemble_attacks.errors import unknown_name
from ensemble_attacks.models.adopted import as_ensemble
from ensemble_attacks.models.ask import as_module
from ensemble_attacks.names import split_options

KNOWN = ("members", "vote", "dataset")


def model_of_function(name: str) -> nn.Module:
    """Return the model that a function of a user's own returns, in eval mode.

    Raises:
        ValueError, FileNotFoundError: Where the function cannot be called, or raises.
        TypeError: Where it returns no module.
    """
    model, spec = _returned(name)
    if "members" in spec:
        model = as_ensemble(model, members=spec["members"], **{key: spec[key] for key in ("vote",) if key in spec})
    return model.eval()


def suggested_dataset(name: str) -> str | None:
    """Return the dataset that a user's function names for its model."""
    return _returned(name)[1].get("dataset")


def _returned(name: str) -> tuple[nn.Module, dict[str, Any]]:
    body, _ = split_options(name)
    given = sources.call(name)
    model, spec = given if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], dict) else (given, {})
    if not isinstance(model, nn.Module):
        raise TypeError(f"{body} returns a {type(model).__name__}: let it return a torch.nn.Module, or a module and a dict")
    if unknown := next((key for key in spec if key not in KNOWN), None):
        raise unknown_name(f"key of what {body} says of its model", unknown, KNOWN)
    return as_module(model), spec
