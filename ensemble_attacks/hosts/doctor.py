"""Check whether the installation is sound: torchattacks, AutoAttack and RobustBench as published get in each other's way."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REQUIREMENTS = ("torch", "torchvision", "torchattacks", "robustbench", "timm", "numpy", "scikit-learn", "safetensors")
OK, NOTE, BROKEN = "ok", "note", "broken"


@dataclass(frozen=True)
class Finding:
    """A finding of one check: its status (ok, note or broken), what was found, and the command that mends it."""

    name: str
    status: str
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Run all checks, and return their findings; nothing is imported that could fail, and nothing is changed."""
    findings = [_installed(name) for name in REQUIREMENTS]
    findings += [_autoattack(), _robustbench_files(), _pkg_resources(), _robustbench_import()]
    return findings


def _installed(name: str) -> Finding:
    try:
        return Finding(name, OK, version(name))
    except PackageNotFoundError:
        return Finding(name, BROKEN, "not installed", f"pip install {name}")


def _autoattack() -> Finding:
    for name in ("autoattack", "pyautoattack"):
        if importlib.util.find_spec(name):
            return Finding("AutoAttack", OK, f"the package {name!r}")
    return Finding("AutoAttack", BROKEN, "neither 'autoattack' nor 'pyautoattack'", "pip install pyautoattack==0.2.0")


def _robustbench_files() -> Finding:
    """Check that robustbench is not the old copy in the torchattacks wheel, whose ``eval.py`` is commented out."""
    name = "robustbench's files"
    spec = importlib.util.find_spec("robustbench")
    if spec is None or spec.origin is None:
        return Finding(name, BROKEN, "not installed", "pip install robustbench==1.1.1")
    source = Path(spec.origin).with_name("eval.py")
    if source.exists() and "\ndef benchmark(" in source.read_text():
        return Finding(name, OK, "the published ones")
    return Finding(
        name,
        BROKEN,
        "overwritten by the copy inside torchattacks' wheel (no benchmark())",
        "pip install --force-reinstall --no-deps robustbench==1.1.1",
    )


def _pkg_resources() -> Finding:
    if importlib.util.find_spec("pkg_resources"):
        return Finding("pkg_resources", OK, "there (robustbench imports it)")
    return Finding(
        "pkg_resources", BROKEN, "gone from new setuptools; robustbench imports it", "pip install 'setuptools<81'"
    )


def _robustbench_import() -> Finding:
    name = "import robustbench"
    if importlib.util.find_spec("autoattack"):
        return Finding(name, OK, "finds 'autoattack'")
    return Finding(
        name,
        NOTE,
        "fails as published: it imports 'autoattack', PyPI's package is named 'pyautoattack'",
        "call ensemble_attacks.robustbench.ensure() before the first import of robustbench",
    )
