"""Name what decides a result beside settings, weights and images: code, versions, and what a model is made of."""

from __future__ import annotations

import sys
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.attacks.registry import GROUP as ATTACKS
from ensemble_attacks.files import digest
from ensemble_attacks.models.providers import GROUP as MODELS
from ensemble_attacks.version import __version__

STANDS_ON = (  # the packages whose version may change a result
    "torch",
    "torchvision",
    "torchattacks",
    "pyautoattack",
    "autoattack",
    "robustbench",
    "timm",
    "numpy",
    "scikit-learn",
)


NO_OPTIONS = ("training", "vote")  # the judge decides the one, and a cell names the other


@cache
def code_version() -> str:
    """Return this package's version, and a hash of its sources, of plug-ins' sources, and of the versions they stand on."""
    state = sha256(repr(versions()).encode())
    for path in sorted({Path(__file__).parents[1], *_plug_ins()}):
        _add_sources(state, path)
    return f"{__version__}+{state.hexdigest()[:12]}"


def versions() -> dict[str, str]:
    """Return the versions of the packages that results stand on."""
    found = {"python": ".".join(map(str, sys.version_info[:2])), "torch": str(torch.__version__)}
    for name in STANDS_ON[1:]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _plug_ins() -> set[Path]:
    """Return the packages, or files, that register models or attacks."""
    found = set()
    for group in (MODELS, ATTACKS):
        for entry in entry_points(group=group):
            spec = find_spec(entry.module.partition(".")[0])
            if spec is not None and spec.submodule_search_locations:
                found |= {Path(folder) for folder in spec.submodule_search_locations}
            elif spec is not None and spec.origin:
                found.add(Path(spec.origin))
    return found


def _add_sources(state: Any, path: Path) -> None:
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    for file in files:
        state.update(file.relative_to(path.parent).as_posix().encode() + file.read_bytes())


def made_of(model: nn.Module) -> str:
    """Return a hash of what a model is made of beside its weights: modules, their options, and the code of their classes.

    The options are the plain values among a module's attributes, but for the vote, which a cell names; the code is the file
    of its class, where that is no part of torch or of this package, whose version says it.
    """
    state = sha256()
    for name, module in model.named_modules():
        kind = type(module)
        state.update(f"{name} {kind.__module__}.{kind.__qualname__}".encode())
        values = {key: _plain(value) for key, value in vars(module).items() if not key.startswith("_")}
        options = {key: value for key, value in values.items() if value is not None and key not in NO_OPTIONS}
        state.update(repr(sorted(options.items())).encode())
        state.update(digest(*(buffer for _, buffer in module.named_buffers(recurse=False))).encode())
        state.update(_code_of(kind.__module__))
    return state.hexdigest()[:32]


def _plain(value: Any) -> str | None:
    """Return a plain value, or a container of some, as text; ``None`` for anything else, which may print an address."""
    if isinstance(value, (bool, int, float, complex, str, torch.dtype)):
        return repr(value)
    if isinstance(value, (tuple, list)) and all(_plain(one) is not None for one in value):
        return repr([_plain(one) for one in value])
    if isinstance(value, dict) and all(_plain(one) is not None for pair in value.items() for one in pair):
        return repr(sorted((_plain(key), _plain(one)) for key, one in value.items()))
    return digest(value) if isinstance(value, Tensor) else None


@cache
def _code_of(module: str) -> bytes:
    """Return the source of a module that is of neither torch nor this package; empty where there is none."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if module.partition(".")[0] in ("torch", "ensemble_attacks", "defenses") or file is None or not Path(file).is_file():
        return b""
    return sha256(Path(file).read_bytes()).digest()
