"""Verify a run or a bundle for the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ensemble_attacks.cli.console import console, shown
from ensemble_attacks.cli.options import RECRAFTED
from ensemble_attacks.evaluation import audit, bundles
from ensemble_attacks.evaluation.external import MISSING, compare_bundle, read_bundle, run_of, text_of
from ensemble_attacks.evaluation.ledger import MANIFEST, Ledger
from ensemble_attacks.evaluation.origins import placed_anew
from ensemble_attacks.evaluation.summary import run_digest
from ensemble_attacks.evaluation.units import threat_of
from ensemble_attacks.extras import extra
from ensemble_attacks.models import providers
from ensemble_attacks.models.ask import moved
from ensemble_attacks.threat import number
from ensemble_attacks.validation import check_count, check_device

WIDE: Any = {"highlight": False, "soft_wrap": True}


def verify_path(
    path: Path,
    named: dict[str, Any],
    claimed: dict[str, Any],
    *,
    recraft: int | None,
    seed: int,
    report: Path | None,
    bundle: Path | None,
    device: str,
) -> None:
    """Print what is found of a run or a bundle; exit with 1 where anything differs.

    Args:
        path: the run's folder, or the bundle.
        named: where model and data are by now.
        claimed: what the caller says of a bundle.
        recraft, seed: how many units are crafted anew, and which; ``None``: the default of a run or a bundle.
        report, bundle: of a run: its report, and a bundle that it was exported as.
        device: where the model is asked.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: name the folder of `evaluate --out`, or a bundle")
    check_device(device)
    if recraft is not None:
        check_count("recraft", recraft, at_least=0)
    check_count("seed", seed, at_least=0)
    if (path / MANIFEST).exists():
        if given := [key for key, value in claimed.items() if value is not None]:
            raise ValueError(f"{path} is a run, which has its own {given[0]}: leave --{given[0]} out")
        ledger = Ledger(path)
        findings = audit.verify(ledger, device, **named, recraft=recraft or 0, seed=seed)
        beside, drawn = _beside(ledger, report, bundle, device)
        findings += beside
        _print(findings, (*audit.NOT_VERIFIABLE, *drawn))
        console.print(f"digest {run_digest(ledger)}", highlight=False)
    else:
        if report is not None or bundle is not None:
            raise ValueError(f"{path} is no run: --report and --bundle go with a run's folder")
        crafted = RECRAFTED if recraft is None else recraft
        claimed |= {"model": named["model"], "dataset": named["dataset"]}
        places = {"model_dir": named["model_dir"], "data_dir": named["data_dir"] or "data"}
        findings, absent = _examine(path, places, claimed, crafted, seed, device)
        _print(findings, (*bundles.NOT_VERIFIABLE, *absent))
    sys.exit(1 if any(finding["differ"] != 0 for finding in findings) else 0)


def _beside(
    ledger: Ledger, report: Path | None, bundle: Path | None, device: str
) -> tuple[list[audit.Finding], tuple[str, ...]]:
    """Return what is found of a run's report and bundle, where there are any, and which drawings nobody has compared."""
    folder = report or ledger.folder / "report"
    findings, drawn = [], list[str]()
    if report is not None or folder.exists():
        with extra("report", "a report, also to compare one,"):
            from ensemble_attacks.evaluation.report.compare import compare_report

        lines, drawn = compare_report(ledger, folder, device)
        findings.append(_finding(f"report {folder}", lines))
    if bundle is not None:
        findings.append(_finding(f"bundle {bundle}", compare_bundle(ledger, bundle)))
    return findings, tuple(f"the drawing {name}: it is another one, draw it anew (`report --out`)" for name in drawn)


def _finding(name: str, lines: list[str]) -> audit.Finding:
    return {"unit": name, "n": 0, "robust": 0, "differ": len(lines), "what": lines}


def _examine(
    path: Path, places: dict[str, Any], claimed: dict[str, Any], recraft: int, seed: int, device: str
) -> tuple[list[audit.Finding], list[str]]:
    """Return what is found of a bundle, and of what it holds nothing, after printing the judge's verdict."""
    manifest = run_of(path)
    images, about = read_bundle(path, threat_of(manifest or {}).box)
    if manifest is not None:
        manifest["places"] |= places
        manifest = placed_anew(manifest, claimed["model"], claimed["dataset"])
    said: dict[str, Any] = {"vote": about.get("vote") or "softmax", "dataset": about.get("dataset"), "eps": about.get("eps")}
    said |= {"norm": about.get("threat_model") or "Linf", "draws": about.get("draws") or 1}
    said["transform"] = manifest["sweep"]["transform"] if manifest else ""
    said["dataset"] = said["dataset"] or (
        claimed["model"] and providers.implied_dataset(claimed["model"], places["model_dir"])
    )
    chosen: dict[str, Any] = {key: said.get(key) if value is None else value for key, value in claimed.items()}
    for key in ("model", "dataset", "eps"):
        if chosen[key] is None:
            raise ValueError(f"{path} does not say its {key}: pass --{key}")
    chosen["eps"] = number(chosen["eps"])
    claim = bundles.Claim(**chosen)
    model = moved(providers.load_model(claim.model, places["model_dir"], claim.dataset, vote=claim.vote), device)
    verdict, lines = bundles.examine_bundle(images, about, claim, manifest, model, places["data_dir"], text_of(path))
    console.print(f"{shown(claim.model)}: {verdict}", highlight=False)
    findings = [_finding(f"bundle {path}", lines)]
    if manifest is not None and recraft and not lines:
        findings += bundles.recraft_bundle(manifest, images, device, recraft, seed)
    given_up = manifest.get(MISSING, []) if manifest is not None else []
    return findings, [f"{name}, which the bundle says was given up" for name in given_up]


def _print(findings: Sequence[audit.Finding], not_verifiable: Sequence[str]) -> None:
    for finding in findings:
        if finding["differ"] is None:
            text = ""
        elif finding["n"]:
            text = " {robust} of {n} robust, {differ} differ".format(**finding)
        else:
            text = f" {finding['differ']} differ"
        what = "" if finding["differ"] == 0 else ";".join(f" {line}" for line in finding["what"][:1])
        console.print(f"{shown(finding['unit'])}:{text}{';' if text and what else ''}{shown(what)}", **WIDE)
        for line in finding["what"][1:]:
            console.print(f"{shown(finding['unit'])}: {shown(line)}", **WIDE)
    for line in not_verifiable:
        console.print(f"not verifiable: {shown(line)}", **WIDE)
