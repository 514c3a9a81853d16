"""A run that another version of the package wrote is told in one line, and is left as it is, not called damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ensemble_attacks import LedgerError
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.external import export_robustbench
from ensemble_attacks.evaluation.leases import sealed
from ensemble_attacks.evaluation.ledger import SCHEMA, Ledger
from ensemble_attacks.evaluation.units import chains_of
from tests.evaluation.test_ledger import invoke, manifest

SWEEP: dict[str, Any] = {"attacks": ("torchattacks:FGSM",), "n": 4, "shard_size": 4}


@pytest.fixture(scope="module")
def today(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("today") / "run"
    run(Ledger(folder, manifest(**SWEEP)))
    export_robustbench(folder, folder.with_name("bundle"), partial=True)
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def aged(path: Path, schema: object) -> None:
    """Let a manifest say that it is of another version."""
    content = json.loads(path.read_text())
    content.pop("sha256")
    path.write_bytes(sealed(content | {"schema": schema, "code": "0.0.9+abc"}))


def of_schema(today: Path, place: Path, schema: object) -> Path:
    """Copy a run as the schema before had it: its units lack what came later."""
    shutil.copytree(today, folder := place / "run")
    aged(folder / "manifest.json", schema)
    for unit in chains_of(Ledger(today).manifest)[0]:
        path = folder / "units" / f"{unit.identity}.json"
        content = json.loads(path.read_text())
        for key in ("sha256", "failed", "disagreement", "zero_gradients"):
            content.pop(key)
        path.write_bytes(sealed(content))
    return folder


def told(age: str, schema: object) -> str:
    return (
        f"was written by {age} version (schema {schema}, this one has {SCHEMA}): begin anew in another folder, or use the "
        "version of its code, 0.0.9+abc"
    )


@pytest.mark.parametrize(
    ("schema", "age"), [(SCHEMA - 1, "an earlier"), (SCHEMA + 1, "a later"), (None, "an earlier"), ("x", "an earlier")]
)
def test_a_run_of_another_version(schema: object, age: str, today: Path, tmp_path: Path) -> None:
    folder = of_schema(today, tmp_path, schema)
    before = contents(folder)
    for read in (lambda: Ledger(folder), lambda: Ledger(folder, manifest(**SWEEP))):
        with pytest.raises(LedgerError) as refused:
            read()
        assert told(age, schema) in str(refused.value)
    assert contents(folder) == before


@pytest.mark.parametrize("command", ["status", "verify", "resume", "report"])
def test_commands_say_so_in_one_line(command: str, today: Path, tmp_path: Path) -> None:
    folder = of_schema(today, tmp_path, SCHEMA - 1)
    before = contents(folder)
    result = invoke(command, folder)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert told("an earlier", SCHEMA - 1) in result.output
    assert contents(folder) == before


def test_a_bundle_of_another_version(today: Path, tmp_path: Path) -> None:
    shutil.copytree(today.with_name("bundle"), bundle := tmp_path / "bundle")
    aged(bundle / "run.json", SCHEMA - 1)
    result = invoke("verify", bundle, "--model", "gal_convnet_3")
    assert result.exit_code == 2
    assert told("an earlier", SCHEMA - 1) in " ".join(result.output.split())
