"""Import what only some need, the extras of ``pyproject.toml``; tell which to install where one is missing."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from ensemble_attacks.errors import MissingExtraError, said

OURS = ("ensemble_attacks", "defenses")
APART = {"mlflow": "mlflow"}  # what is no extra, as it wants a newer requests than torchattacks does, and what to install


def install(name: str) -> str:
    """Return the command that installs an extra, or what is none and asked for in the same way."""
    return f"pip install {APART[name]}" if name in APART else f"pip install 'ensemble-attacks[{name}]'"


@contextmanager
def extra(name: str, purpose: str) -> Iterator[None]:
    """Raise an import that fails within the context as the error that names the extra to install.

    Args:
        name: the extra, as in ``pip install 'ensemble-attacks[NAME]'``.
        purpose: what asks for it, as the message's subject.

    Raises:
        MissingExtraError: Where a package is not installed, or cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        if isinstance(error, MissingExtraError) or (error.name or "").partition(".")[0] in OURS:
            raise
        lacks = isinstance(error, ModuleNotFoundError) and error.name
        found = f"{error.name}, which is not installed" if lacks else f"what cannot be imported ({said(error)})"
        raise MissingExtraError(f"{purpose} needs {found}: {install(name)}", name=error.name, path=error.path) from error


@contextmanager
def silenced() -> Iterator[None]:
    """Keep quiet about what others' packages warn of while they are imported, which is not the user's to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


HUB_NAMES = ("repo_type_and_id_from_hf_id",)  # that timm 1.0.9 imports, for uploads alone, and huggingface_hub 2 has no more


def import_timm(purpose: str, name: str = "timm") -> ModuleType:
    """Import timm, and return it; under huggingface_hub 2, an older timm also finds the hub.

    timm 1.0.9 takes the hub for missing where one of its names is, which then stands in while timm is imported.

    Raises:
        MissingExtraError: Where timm is not installed, or cannot be imported.
    """
    with extra(name, purpose), silenced():
        if "timm" in sys.modules or not (lacking := _lacking_in_hub()):
            return import_module("timm")
        hub = import_module("huggingface_hub")
        for key in lacking:
            setattr(hub, key, _no_uploads)
        try:
            return import_module("timm")
        finally:
            for key in lacking:
                delattr(hub, key)


def _lacking_in_hub() -> list[str]:
    try:
        hub = import_module("huggingface_hub")
    except ImportError:
        return []
    return [key for key in HUB_NAMES if not hasattr(hub, key)]


def _no_uploads(*arguments: object, **options: object) -> None:
    raise ImportError("this timm cannot upload with huggingface_hub 2: pip install -U timm")
