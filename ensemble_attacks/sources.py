"""Call functions of a user's own, ``path/to/file.py:function`` or ``package.module:function``, and digest their source.

The code is the user's, and is run. Its source is the file's, and that of every module that it imports from the same folder,
or from the same package.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib.metadata import packages_distributions, version
from pathlib import Path
from types import ModuleType
from typing import Any

from ensemble_attacks.errors import said, unknown_name
from ensemble_attacks.names import FILE_FUNCTION, MODULE_FUNCTION, options_in, split_options
from ensemble_attacks.randomness import seeded


def is_function(name: str) -> bool:
    """Tell whether a name is that of a function, ``file.py:function`` or ``package.module:function``."""
    body, _ = split_options(name)
    if FILE_FUNCTION.fullmatch(body):
        return True
    match = MODULE_FUNCTION.fullmatch(body)
    return bool(match) and _module_file(match["where"]) is not None  # type: ignore[index]


def call(name: str) -> Any:
    """Return what a function of a user's own returns, called with the options of its name, all random states seeded.

    Raises:
        FileNotFoundError: Where there is no such file.
        ValueError: Where it cannot be imported, has no such function or option, or the function raises; the message is one
            line.
    """
    body, query = split_options(name)
    match = FILE_FUNCTION.fullmatch(body) or MODULE_FUNCTION.fullmatch(body)
    assert match is not None
    where, options = match["where"], options_in(query)
    with _importable(where), seeded(0):
        module = _imported(where)
        function = getattr(module, match["function"], None)
        if not callable(function):
            own = [key for key, value in vars(module).items() if inspect.isfunction(value) or inspect.isclass(value)]
            raise unknown_name(f"function of {where}", match["function"], own)
        _check_options(body, function, options)
        try:
            return function(**options)
        except (Exception, SystemExit) as error:
            raise ValueError(f"{body} raised {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    message = said(error)
    gpu = any(word in message.lower() for word in ("cuda", "nvidia", "hip gpu"))
    hint = ": let it make the model on the CPU (map_location='cpu'), it is moved to --device afterwards" if gpu else ""
    return f"{message}{hint}"


def _check_options(name: str, function: Any, options: dict[str, Any]) -> None:
    """Raise a `ValueError` unless a function takes these options, and needs no others."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of built-in code
        return
    takes = {key: of for key, of in parameters.items() if of.kind in (of.POSITIONAL_OR_KEYWORD, of.KEYWORD_ONLY)}
    everything = any(of.kind is of.VAR_KEYWORD for of in parameters.values())
    for key in options:
        if key not in takes and not everything:
            raise unknown_name(f"option of {name}", key, takes)
    if lacking := [key for key, of in takes.items() if of.default is of.empty and key not in options]:
        raise ValueError(f"{name} needs {lacking[0]}: write {name}?{lacking[0]}=VALUE, or give it a default")


@contextmanager
def _importable(where: str) -> Iterator[None]:
    """Let the file's neighbours, or modules of the working directory, be imported within the context.

    Neighbours of a file are imported anew, under their names, and what had these names before has them again afterwards.
    """
    path = Path(where).resolve() if where.endswith(".py") else None
    folder = str(path.parent if path else Path.cwd())
    neighbours = {_top(key) for key in _closure(path, path.parent)} if path else set()
    before = {key: module for key, module in sys.modules.items() if key.split(".")[0] in neighbours}
    for key in before:
        del sys.modules[key]
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # nothing is left in the user's folder
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes
        sys.path.remove(folder)
        sys.modules.update(before)


def _top(key: str) -> str:
    """Return the name of the module or package that a path belongs to."""
    return key.split("/")[0].removesuffix(".py")


def _imported(where: str) -> ModuleType:
    """Return the module of a file or name.

    Raises:
        FileNotFoundError: Where there is no such file.
        ValueError: Where it raises while it is imported.
    """
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        path = Path(where).resolve()
        if not path.is_file():
            raise FileNotFoundError(_no_file(where))
        called = f"{path.stem}_file_{sha256(str(path).encode()).hexdigest()[:8]}"  # for inspect, pickle, and errors
        spec = importlib.util.spec_from_file_location(called, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[called] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except FileNotFoundError as error:
        if error.filename is None:
            raise
        raise ValueError(f"{where} cannot be imported: {_one_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where} cannot be imported: {_one_line(error)}") from error


def anywhere(text: str) -> str:
    """Return a text that names modules of files so that it does not depend on where these lie."""
    return re.sub(r"_file_[0-9a-f]{8}\b", "", text)


def _no_file(where: str) -> str:
    return f"there is no file {where!r}: name the file and the function, as in nets.py:make"


# -- identity


def sources_of(name: str) -> dict[str, str]:
    """Return the sha256 of the source of a function's file, and of all that it imports from its folder or package, by path.

    Raises:
        FileNotFoundError: Where there is no such file.
    """
    return {key: sha256(path.read_bytes()).hexdigest() for key, path in sorted(_files_of(name).items())}


def environment_of(name: str) -> dict[str, str]:
    """Return the versions of Python, torch, and the packages that the files of `sources_of` import."""
    imported = {module.split(".")[0] for path in _files_of(name).values() for module in _imports(path)}
    owners = _owners()
    packages = {"torch", *(owner for module in imported for owner in owners.get(module, ()))}
    return {"python": ".".join(map(str, sys.version_info[:3])), **{key: version(key) for key in sorted(packages)}}


@cache
def _owners() -> dict[str, list[str]]:
    """Return which distributions every importable package is of; it takes reading all of them."""
    return dict(packages_distributions())


def _files_of(name: str) -> dict[str, Path]:
    body, _ = split_options(name)
    match = FILE_FUNCTION.fullmatch(body)
    if match:
        path = Path(match["where"]).resolve()
        if not path.is_file():
            raise FileNotFoundError(_no_file(match["where"]))
        return {path.name: path, **_closure(path, path.parent)}
    where = body.partition(":")[0]
    file, top = _module_file(where), _module_file(where.split(".")[0])
    assert file is not None
    assert top is not None
    if is_installed(file):  # an installed package's version says what it is
        return {file.name: file}
    root = top.parents[1] if top.name == "__init__.py" else top.parent
    inside = {key: path for key, path in _closure(file, root).items() if _top(key) == where.split(".")[0]}
    return {file.relative_to(root).as_posix(): file, **inside}


def is_installed(file: Path) -> bool:
    """Tell whether a file is an installed package's, whose version says what it is."""
    return bool({"site-packages", "dist-packages"} & set(file.parts))


def _module_file(name: str) -> Path | None:
    """Return the file of a module, which need not have been imported; ``None`` where there is none."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None
    finally:
        sys.path.pop(0)
    return Path(spec.origin).resolve() if spec and spec.origin and spec.origin.endswith(".py") else None


def _closure(path: Path, root: Path) -> dict[str, Path]:
    """Return the files under ``root`` that a file imports, and those that these import, by their paths from there."""
    found: dict[str, Path] = {}
    waiting = [path] if path.is_file() else []
    while waiting:
        for name in _imports(file := waiting.pop(), root):
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):  # of a package, also the __init__.py of those around it
                stem = root.joinpath(*parts[:depth])
                for candidate in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")):
                    key = candidate.relative_to(root).as_posix() if candidate.is_file() else ""
                    if key and key not in found and candidate not in (file, path):
                        found[key] = candidate
                        waiting.append(candidate)
    return found


def _imports(path: Path, root: Path | None = None) -> Iterator[str]:
    """Yield the names of modules that a file imports anywhere, those of ``from a import b`` as ``a.b``."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # told when it is imported
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package: list[str] = []
            if node.level:
                if root is None:
                    continue
                above = path.parents[node.level - 1]
                package = list(above.relative_to(root).parts) if above.is_relative_to(root) else []
            start = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}".strip(".") for alias in node.names)
