"""Say how a run is run again: as a command, and as a file that ``ensemble-attacks sweep`` reads."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from typing import Any

from ensemble_attacks.evaluation.settings import Sweep
from ensemble_attacks.evaluation.units import threat_of
from ensemble_attacks.models.votes import OWN

ALWAYS = ("models", "eps", "attacks", "dataset")  # said even where they are as they would be by default
SINGLE = {"models": "--model", "votes": "--vote", "eps": "--eps", "seeds": "--seed"}  # options that `evaluate` takes one of
OTHERWISE = {"dataset": "--data"}


def settings_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what a run was asked for, as a sweep's file has it, without what is so by default."""
    asked = manifest["sweep"]
    kept: dict[str, Any] = {}
    for of in fields(Sweep):
        default = list(of.default) if isinstance(of.default, tuple) else of.default
        if of.name in asked and (of.name in ALWAYS or asked[of.name] != default):
            kept[of.name] = asked[of.name]
    if kept.get("sample") is not None:
        del kept["n"]  # which follows
    if kept.get("votes") == [OWN]:
        del kept["votes"]  # which the model says itself
    if asked["shard_size"] == asked["n"]:
        kept.pop("shard_size", None)
    box = threat_of(manifest).box
    bounds = [box.low, box.high]
    if manifest.get("threat") and all(isinstance(bound, (int, float)) for bound in bounds):
        kept["box"] = bounds
    return kept


def as_toml(manifest: dict[str, Any]) -> str:
    """Return a file that ``ensemble-attacks sweep`` reads; arrays, which it has in files of their own, are in a comment."""
    threat = threat_of(manifest)
    lines = [f"{key} = {_value(value)}" for key, value in settings_of(manifest).items()]
    if not threat.plain:
        lines.insert(0, f"# the run's box, movable features and radii have the sha256 {threat.digest}: arrays go into files")
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """Return a value as TOML has it, whose strings, numbers, truth values and lists are those of JSON, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def as_command(manifest: dict[str, Any]) -> str:
    """Return the command that runs it again: ``evaluate`` for one cell, ``sweep`` of the file beside it for several."""
    settings = settings_of(manifest)
    if any(len(settings.get(key, [])) > 1 for key in SINGLE):
        return "ensemble-attacks sweep sweep.toml"
    words = ["ensemble-attacks", "evaluate"]
    for key, value in settings.items():
        option = SINGLE.get(key) or OTHERWISE.get(key) or f"--{key.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif key in SINGLE:
            words.append(f"{option}={value[0]}")
        else:
            words.append(f"{option}={','.join(map(str, value)) if isinstance(value, list) else value}")
    return shlex.join(words)
