"""Check whether what is installed fits together, by versions and files; nothing is imported (`trials` does).

torchattacks, AutoAttack and RobustBench as published get in each other's way.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from ensemble_attacks.extras import APART, install

OURS = "ensemble-attacks"
OK, NOTE, ABSENT, BROKEN = "ok", "note", "absent", "broken"
EXTRAS = {"robustbench": "robustbench", "timm": "timm", "report": "matplotlib", "hf": "transformers", "ray": "ray"}
EXTRAS |= {
    "slurm": "submitit",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "hub": "huggingface_hub",
}  # by extra: the package whose presence tells that somebody asked for it
REINSTALL = "pip install --force-reinstall --no-deps robustbench==1.1.1"


@dataclass(frozen=True)
class Finding:
    """A finding of one check: its status (ok, note, absent or broken), what was found, and the command that mends it."""

    name: str
    status: str
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Return what is found of AutoAttack and RobustBench; nothing is imported, and nothing is changed."""
    findings = [_autoattack(), _robustbench_files()]
    if findings[-1].status != ABSENT:
        findings.append(_pkg_resources())
    return findings


def compare_requirements() -> list[Finding]:
    """Return what is found of each requirement, each extra and the hosts' own pins, by their versions."""
    return [*_requirements(), *_extras(), *_pins_of_hosts(), _defenses()]


def installed(name: str) -> str:
    """Return the version of a package; ``""`` where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _required(of: str, extra: str = "") -> Iterator[Requirement]:
    """Yield what a package requires, or one of its extras does beyond that."""
    try:
        lines = requires(of) or []
    except PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        core = marker is None or marker.evaluate({"extra": ""})
        if core != bool(extra) and (core or (marker is not None and marker.evaluate({"extra": extra}))):
            yield requirement


def _unmet(requirement: Requirement) -> str:
    """Return what is wrong with the version of a required package; empty where it fits."""
    found = installed(requirement.name)
    if not found:
        return "not installed"
    return (
        "" if requirement.specifier.contains(found, prereleases=True) else f"{found}, but {requirement.specifier} is needed"
    )


def _requirements() -> list[Finding]:
    own = list(_required(OURS))
    if not own:
        return [Finding(OURS, NOTE, "used from a folder, not installed: versions are not compared", f"pip install {OURS}")]
    findings = []
    for requirement in own:
        wrong = _unmet(requirement)
        remedy = f"pip install '{requirement.name}{requirement.specifier}'" if wrong else ""
        findings.append(Finding(requirement.name, BROKEN if wrong else OK, wrong or installed(requirement.name), remedy))
    return findings


def _extras() -> list[Finding]:
    findings = []
    for extra, package in EXTRAS.items():
        name, command = extra if extra in APART else f"[{extra}]", install(extra)
        if not installed(package):
            findings.append(Finding(name, ABSENT, f"not installed, needed for nothing else; to have it: {command}"))
            continue
        wrong = [f"{one.name} {told}" for one in _required(OURS, extra) if (told := _unmet(one))]
        found = "; ".join(wrong) or f"{package} {installed(package)}"
        findings.append(Finding(name, NOTE if wrong else OK, found, command if wrong else ""))
    return findings


def _pins_of_hosts() -> list[Finding]:
    """Return the requirements of hosts that are not met; whether that matters, the trial imports tell."""
    findings = []
    for host in ("torchattacks", "pyautoattack", "robustbench"):
        for requirement in _required(host) if installed(host) else ():
            if wrong := _unmet(requirement):
                told = f"{wrong} by {host}; no harm where its trial import below is ok"
                findings.append(Finding(requirement.name, NOTE, told))
    return findings


def _defenses() -> Finding:
    """Check that ``defenses`` is this package's, and no folder of that name in the working directory."""
    spec = importlib.util.find_spec("defenses")
    registered = any(entry.value == "defenses" for entry in entry_points(group="ensemble_attacks.models"))
    if spec is None or spec.origin is None or not Path(spec.origin).with_name("zoo").is_dir():
        found = spec.origin or list(spec.submodule_search_locations or ()) if spec else "no package of that name"
        return Finding("defenses", BROKEN, f"not this package's: {found}", "rename that folder, or work in another one")
    if not registered:
        return Finding("defenses", NOTE, "ours, but not registered: no model is found by name", f"pip install {OURS}")
    return Finding("defenses", OK, "this package's")


def _autoattack() -> Finding:
    for name in ("autoattack", "pyautoattack"):
        if importlib.util.find_spec(name):
            return Finding("AutoAttack", OK, f"the package {name!r}")
    return Finding("AutoAttack", BROKEN, "neither 'autoattack' nor 'pyautoattack'", "pip install pyautoattack==0.2.0")


def _robustbench_files() -> Finding:
    """Check that robustbench is not the old copy in the torchattacks wheel, whose ``eval.py`` is commented out."""
    name = "robustbench's files"
    if not installed("robustbench"):
        return Finding(name, ABSENT, "not installed", f"pip install '{OURS}[robustbench]'")
    spec = importlib.util.find_spec("robustbench")
    source = Path(spec.origin).with_name("eval.py") if spec and spec.origin else None
    if source is not None and source.exists() and "\ndef benchmark(" in source.read_text():
        return Finding(name, OK, "the published ones")
    return Finding(name, BROKEN, "overwritten by the copy inside torchattacks' wheel (no benchmark())", REINSTALL)


def _pkg_resources() -> Finding:
    if importlib.util.find_spec("pkg_resources"):
        return Finding("pkg_resources", OK, "there (robustbench imports it)")
    return Finding(
        "pkg_resources", BROKEN, "gone from new setuptools; robustbench imports it", "pip install 'setuptools<81'"
    )
