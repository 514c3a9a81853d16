"""What a forger changes in a finished run, with every seal recomputed, is caught by `verify`, or declared not verifiable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from ensemble_attacks import LedgerError
from ensemble_attacks.evaluation import audit
from ensemble_attacks.evaluation.audit import verify
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.units import chains_of
from tests.evaluation.forgeries import all_of, declared, files_of, rewrite
from tests.evaluation.test_ledger import ledger_in

FORGED = {"plain": {}, "cascade": {"cascade": True}}


@pytest.fixture(scope="module", params=FORGED)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    run(ledger_in(folder, attacks=("ea-apgd-ce", "torchattacks:FGSM"), n=6, shard_size=6, **FORGED[request.param]))
    return folder


def caught(folder: Path) -> bool:
    try:
        return any(finding["differ"] != 0 for finding in verify(Ledger(folder)))
    except (LedgerError, FileNotFoundError, ValueError):
        return True


def missed(finished: Path, place: Path, some: slice) -> list[str]:
    """Make forgeries, some of each stored thing, and return those that are neither caught nor declared."""
    assert not caught(finished)
    found, left = {}, []
    for kind, forgeries in all_of(finished).items():
        assert len(forgeries) >= 40, kind
        counts = {"caught": 0, "declared": 0}
        for name, forge in forgeries[some]:
            shutil.copytree(finished, folder := place / "forged")
            forge(folder)
            if caught(folder):
                counts["caught"] += 1
            elif declared(kind, name):
                counts["declared"] += 1
            else:
                left.append(f"{kind}: {name}")
            shutil.rmtree(folder)
        found[kind] = counts
    print(json.dumps(found))  # noqa: T201
    return left


def test_forgeries_are_caught_or_declared(finished: Path, tmp_path: Path) -> None:
    """One of 24; all of them in the slow test."""
    assert not missed(finished, tmp_path, slice(None, None, 24))


@pytest.mark.slow
def test_every_forgery_is_caught_or_declared(finished: Path, tmp_path: Path) -> None:
    assert not missed(finished, tmp_path, slice(None))


def test_weak_images_under_a_strong_attacks_name_are_caught_by_crafting_anew(finished: Path, tmp_path: Path) -> None:
    """The clean images, judged and sealed as if the attack had found nothing better."""
    shutil.copytree(finished, folder := tmp_path / "forged")
    ledger = Ledger(folder)
    ((clean, unit, *_),) = chains_of(ledger.manifest)
    images = load(files_of(folder, clean)[1].read_bytes())

    def weaken(found: dict[str, torch.Tensor], info: dict[str, object]) -> None:
        rows = found["rows"]
        found |= {"x_adv": images["x_adv"][rows], "right": images["right"].clone(), "margin": images["margin"][rows]}
        found |= {key: images[key][..., rows] for key in ("robust", "invalid", "correct")}

    rewrite(folder, unit, weaken)
    if unit.cell.cascade:
        return  # the next attack's rows tell it
    forged = [finding for finding in verify(Ledger(folder), recraft=2) if finding["differ"]]
    assert [finding["unit"] for finding in forged] == ["summary.json", f"{unit.name}, crafted anew"]
    assert any("x_adv" in line for line in forged[-1]["what"])


def test_what_nobody_can_verify_is_said() -> None:
    text = " ".join(audit.NOT_VERIFIABLE)
    assert all(word in text for word in ("passes", "seconds", "traces", "parts of a suite", "no weaker ones"))
