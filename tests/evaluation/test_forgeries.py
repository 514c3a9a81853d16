"""What a forger changes in a finished run, with every seal recomputed, is caught by `verify`, or declared not verifiable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from ensemble_attacks import LedgerError
from ensemble_attacks.evaluation import audit
from ensemble_attacks.evaluation.audit import verify
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.ledger import ATTEMPTS, Ledger
from ensemble_attacks.evaluation.units import chains_of
from ensemble_attacks.norms import Box
from ensemble_attacks.threat import Threat
from tests.evaluation.forgeries import all_of, declared, files_of, rewrite
from tests.evaluation.renamed import asked_otherwise, rename
from tests.evaluation.test_ledger import ledger_in
from tests.helpers import slow_but

RADII = 0.05 + 0.1 * torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
THREAT = Threat(Box(-1, 1), RADII > 0.07, {RADII.max().item(): RADII})
FORGED: dict[str, dict[str, Any]] = {
    "plain": {},
    "cascade": {"cascade": True},
    "box, mask, eps by feature": {"threat": THREAT, "eps": tuple(THREAT.radii), "attacks": ("ea-apgd-ce", "mora")},
    "curve": {"attacks": ("minimal:ea-apgd-ce", "torchattacks:FGSM")},
    "draws": {"models": ("multiresolution_convnet_1",), "draws": 3, "eot_iter": 2},
    "given up": {"attacks": ("ea-apgd-ce", "torchattacks:PGD?steps=2", "torchattacks:FGSM")},
}


@pytest.fixture(scope="module", params=slow_but(("plain", "cascade"), FORGED))
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param.split()[0]) / "run"
    given = {"attacks": ("ea-apgd-ce", "torchattacks:FGSM"), "n": 6, "shard_size": 6} | FORGED[request.param]
    ledger = ledger_in(folder, **given)
    for unit in chains_of(ledger.manifest)[0] if request.param == "given up" else ():
        for _ in range(ATTEMPTS if "PGD" in unit.attack else 0):
            ledger.fail(unit, "RuntimeError: out of luck")
    run(ledger)
    return folder


def found(folder: Path) -> list[dict[str, Any]] | None:
    """Return what `verify` finds; ``None`` where it refuses to begin."""
    try:
        return [finding for finding in verify(Ledger(folder)) if finding["differ"] != 0]
    except (LedgerError, FileNotFoundError, ValueError):
        return None


def missed(finished: Path, place: Path, some: slice) -> list[str]:
    """Make forgeries, some of each stored thing, and return those that are neither caught nor declared."""
    honest = found(finished)
    assert [finding["what"] for finding in honest or []] in ([], [["missing"]])  # the unit that was given up
    table, left = {}, []
    for kind, forgeries in all_of(finished).items():
        assert len(forgeries) >= 40, kind
        counts = {"caught": 0, "declared": 0}
        for name, forge in forgeries[some]:
            shutil.copytree(finished, folder := place / "forged")
            forge(folder)
            if found(folder) != honest:
                counts["caught"] += 1
            elif declared(kind, name):
                counts["declared"] += 1
            else:
                left.append(f"{kind}: {name}")
            shutil.rmtree(folder)
        table[kind] = counts
    print(json.dumps(table))  # noqa: T201
    return left


def test_forgeries_are_caught_or_declared(finished: Path, tmp_path: Path) -> None:
    """One of 48, of a cascade others; all of them in the slow test."""
    first = 24 if Ledger(finished).manifest["sweep"]["cascade"] else 0
    assert not missed(finished, tmp_path, slice(first, None, 48))


@pytest.mark.slow
def test_every_forgery_is_caught_or_declared(finished: Path, tmp_path: Path) -> None:
    assert not missed(finished, tmp_path, slice(None))


def test_weak_images_under_a_strong_attacks_name_are_caught_by_crafting_anew(finished: Path, tmp_path: Path) -> None:
    """The clean images, judged and sealed as if the attack had found nothing better."""
    shutil.copytree(finished, folder := tmp_path / "forged")
    ledger = Ledger(folder)
    ((clean, unit, *rest),) = chains_of(ledger.manifest)
    images = load(files_of(folder, clean)[1].read_bytes())

    def weaken(found: dict[str, torch.Tensor], info: dict[str, object]) -> None:
        rows = found["rows"]
        found |= {"x_adv": images["x_adv"][rows], "right": images["right"].clone(), "margin": images["margin"][rows]}
        found |= {key: images[key][..., rows] for key in ("robust", "invalid", "correct")}

    rewrite(folder, unit, weaken)
    if unit.cell.cascade:
        return  # the next attack's rows tell it
    forged = [finding for finding in verify(Ledger(folder), recraft=len(rest) + 1) if finding["differ"]]
    assert [finding["unit"] for finding in forged] == ["summary.json", f"{unit.name}, crafted anew"]
    assert any("x_adv" in line for line in forged[-1]["what"])


@pytest.mark.slow
def test_images_of_another_run_are_caught_by_crafting_anew(finished: Path, tmp_path: Path) -> None:
    """Another eps, norm, seed, attack, box, mask, ..., and all names, hashes and verdicts as these ask for."""
    if "PGD" in finished.joinpath("manifest.json").read_text():
        pytest.skip("a unit was given up")
    told = {}
    for name, manifest in asked_otherwise(finished).items():
        shutil.rmtree(out := tmp_path / "renamed", ignore_errors=True)
        if not rename(finished, manifest, out):
            told[name] = "cannot be written: images leave the ball, or are missing"
            continue
        findings = verify(Ledger(out), recraft=len(manifest["sweep"]["attacks"]))
        lines = [f"{finding['unit']}: {finding['what']}" for finding in findings if finding["differ"] != 0]
        told[name] = "; ".join(lines)
    print(json.dumps(told, indent=1))  # noqa: T201
    honest = {name.split()[0] for name, lines in told.items() if not lines}  # what is stored is what is found so, too
    assert honest <= {"seeds", "draws"}


def test_what_nobody_can_verify_is_said() -> None:
    text = " ".join(audit.NOT_VERIFIABLE)
    assert all(word in text for word in ("passes", "seconds", "traces", "parts of a suite", "no weaker ones"))
