"""Name what decides a result beside settings, weights and images: code, versions, and what a model is made of."""

from __future__ import annotations

import inspect
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
from ensemble_attacks.hosts.identity import described
from ensemble_attacks.models.ask import ask
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.providers import GROUP as MODELS
from ensemble_attacks.sources import anywhere, is_installed
from ensemble_attacks.version import __version__

STANDS_ON = (  # the packages whose version may change a result
    "torch",
    "torchvision",
    "torchattacks",
    "pyautoattack",
    "autoattack",
    "robustbench",
    "timm",
    "transformers",
    "numpy",
)


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


def made_of(model: nn.Module, x: Tensor) -> str:
    """Return a hash of what a model is made of beside its weights: modules, their options, and the code of their classes.

    The options are the attributes of modules (`described`), but for a named vote, which a cell names, and for those that
    change while the model is asked, as counts of passes do. The code of torch's and this package's classes is their version;
    that of a user's own, which may lie anywhere, the source of the class; of others, the file.

    Args:
        model: the model; it is left as it was.
        x: images (N, C, H, W) like those that it takes, whose values do not matter.
    """
    state = sha256()
    shades = torch.linspace(0, 1, 2 * x[0].numel()).view(2, *x.shape[1:]).to(x)
    with guarded(model), torch.no_grad():
        ask(model, shades)  # what it notes once is noted
        before = _options(model)
        ask(model, shades.square())
        after = _options(model)
    for name, module in model.named_modules():
        options = sorted((key, value) for key, value in after[name].items() if before[name].get(key) == value)
        state.update(f"{name} {_kind_said(type(module))} {options}".encode())
        state.update(digest(*(buffer for _, buffer in module.named_buffers(recurse=False))).encode())
    return state.hexdigest()[:32]


def _options(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return the attributes that decide what the modules of a model compute, by module and name, as text."""
    return {
        name: {key: anywhere(repr(described(value))) for key, value in vars(module).items() if _is_option(key, value)}
        for name, module in model.named_modules()
    }


def _is_option(key: str, value: Any) -> bool:
    named = key == "vote" and (value is None or isinstance(value, str))
    return not (key.startswith("_") or key == "training" or named or isinstance(value, (nn.Module, torch.Generator)))


def _kind_said(kind: type) -> str:
    """Return a class's name and the hash of its code."""
    top, file = kind.__module__.partition(".")[0], getattr(sys.modules.get(kind.__module__), "__file__", None)
    if top in ("torch", "ensemble_attacks", "defenses"):
        return f"{kind.__module__}.{kind.__qualname__}"
    if file is not None and is_installed(Path(file)):
        return f"{kind.__module__}.{kind.__qualname__} {_digest_of(Path(file))}"
    return f"{kind.__qualname__} {source_of(kind)}"


def source_of(kind: type) -> str:
    """Return the sha256 of the source of a class, wherever it lies; empty where it is typed in, or compiled."""
    return _source_of(kind)


@cache  # a deep network has hundreds of modules of a few classes
def _source_of(kind: type) -> str:
    try:
        return sha256(inspect.getsource(kind).encode()).hexdigest()
    except (OSError, TypeError):
        return ""


@cache
def _digest_of(file: Path) -> str:
    """Return the sha256 of a file; empty where there is none."""
    return sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
