"""Write and read RobustBench's external evaluations: a bundle to submit, and anybody's bundle to be judged.

RobustBench asks (issue template "new external evaluation") for the model, the adversarial images as a ``.pt`` tensor the
size of the test set, the robust accuracy, and how the images were made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble_attacks.evaluation.leases import sealed
from ensemble_attacks.evaluation.ledger import Ledger, Result, read_manifest
from ensemble_attacks.evaluation.report.tables import in_markdown
from ensemble_attacks.evaluation.summary import called, finished, lacking, run_digest
from ensemble_attacks.evaluation.units import chain_of, count_chains, threat_of
from ensemble_attacks.files import check_plain, is_file, load_tensors, read_whole, whole_file, write_whole
from ensemble_attacks.norms import UNIT, Box
from ensemble_attacks.schema import MOST_IMAGES, MOST_JSON, About, read_json
from ensemble_attacks.validation import check_images

IMAGES, ABOUT, TEXT, RUN = "adversarial_images.pt", "model_info.json", "evaluation.md", "run.json"
MISSING = "missing"  # of ``run.json``: the names of units that were given up
NOWHERE: dict[str, Any] = {"model_dir": None, "data_dir": "data", "paths": {}}  # the places of a run, for others
SIGNIFICANT = 0.001  # of robust accuracy, by which an evaluation must be below AutoAttack's to be RobustBench's "external"


def export_robustbench(run: Path, out: Path, *, partial: bool = False) -> Path:
    """Write the bundle of a finished ``evaluate`` run: of every sample, the image that is least often right.

    Attacks that were given up on some images count on the others, and the bundle says so.

    Args:
        run: the folder of a finished ``evaluate``.
        out: a new folder.
        partial: whether a run on fewer images than the test set has may be exported, which RobustBench does not take.

    Returns:
        The path ``out``.

    Raises:
        FileNotFoundError: Where ``run`` holds no run.
        FileExistsError: Where ``out`` is there already.
        LedgerError: Where the run is not finished.
        ValueError: Where it is of several cells, or not of the whole test set.
    """
    ledger = Ledger(run)
    summary, images, accuracy = _finished(ledger)
    whole = ledger.manifest["images"]
    if summary["n"] != whole and not partial:
        raise ValueError(
            f"{run} attacked {summary['n']} images, RobustBench asks for all {whole} of {summary['dataset']}: evaluate "
            "without --n, or export what there is with --partial"
        )
    if ledger.manifest.get("rows") is not None:
        raise ValueError(f"{run} is of a choice of images (--first, --sample, --only-correct), a bundle of the first ones")
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another folder (--out)")
    out.mkdir(parents=True)
    with whole_file(out / IMAGES) as file:
        torch.save(images, file)
    for name, content in _said(ledger, summary, accuracy).items():
        write_whole(out / name, content)
    return out


def _finished(ledger: Ledger) -> tuple[dict[str, Any], Tensor, float]:
    """Return the summary of a finished run's only cell, the worst case's images, and its accuracy in percent.

    Raises:
        LedgerError: Where the run is not finished.
        ValueError: Where it is of several cells, or clean images were given up.
    """
    cells = finished(ledger)["cells"]
    if len(cells) > 1:
        raise ValueError(f"{ledger.folder} holds {len(cells)} cells, a bundle is of one: export a run of `evaluate`")
    (summary,) = cells
    parts = []
    for index in range(count_chains(ledger.manifest)):
        results = [ledger.read(unit) for unit in chain_of(ledger.manifest, index)]
        if results[0] is None:
            raise ValueError(f"{ledger.folder} has not judged all clean images, they were given up: resume it first")
        parts.append(worst_images([result for result in results if result is not None]))
    return summary, torch.cat(parts), 100 * summary["worst_case"]["accuracy"]


def worst_images(results: Sequence[Result]) -> Tensor:
    """Return, of a chain's results, every sample's image that is least often right, by default the clean one.

    An image whose scores decide nothing is right in no draw.
    """
    chosen, right = results[0].tensors["x_adv"].clone(), results[0].tensors["correct"].double().mean(0)
    for result in results[1:]:
        rows, found = result.tensors["rows"], result.tensors["correct"].double().mean(0)
        better = found < right[rows]
        chosen[rows[better]], right[rows[better]] = result.tensors["x_adv"][better].to(chosen), found[better]
    return chosen


def _said(ledger: Ledger, summary: dict[str, Any], accuracy: float) -> dict[str, bytes]:
    """Return the files of a bundle beside its images, by name."""
    return {
        ABOUT: json.dumps(_model_info(summary, accuracy), indent=2).encode() + b"\n",
        TEXT: _text(ledger, summary, accuracy).encode(),
        RUN: sealed(
            ledger.manifest
            | {"places": NOWHERE | {"given": ledger.manifest["places"]["given"]}, MISSING: summary.get("missing", [])}
        ),
    }


def compare_bundle(ledger: Ledger, bundle: Path) -> list[str]:
    """Return a line for each thing in a bundle that is not what the run would be exported as.

    Raises:
        ValueError, FileNotFoundError: Where the run or the bundle cannot be read.
    """
    summary, images, accuracy = _finished(ledger)
    lines = []
    found, _ = read_bundle(bundle, threat_of(ledger.manifest).box)
    if found.shape != images.shape or found.dtype != images.dtype:
        lines.append(f"{IMAGES}: {found.dtype} {tuple(found.shape)}, the run has {images.dtype} {tuple(images.shape)}")
    elif differ := int((found != images).flatten(1).any(1).sum()):
        lines.append(f"{IMAGES}: {differ} of {len(images)} images are not the run's")
    for name, content in _said(ledger, summary, accuracy).items():
        try:
            stored = read_whole(bundle / name, MOST_JSON)
        except (FileNotFoundError, ValueError) as error:
            lines.append(f"{name}: {error}")
            continue
        if stored != content:
            pairs = zip_longest(stored.decode(errors="replace").splitlines(), content.decode().splitlines(), fillvalue="")
            said, due = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
            lines.append(f"{name}: {said.strip()[:100]!r}, the run says {due.strip()[:100]!r}")
    return lines


def run_of(bundle: Path) -> dict[str, Any] | None:
    """Return the manifest of the run that a bundle was exported from; ``None`` where the bundle has none.

    Raises:
        LedgerError: Where another version wrote it.
        ValueError: Where it is damaged.
    """
    path = bundle / RUN
    if not bundle.is_dir() or not is_file(path):
        return None
    try:
        return read_manifest(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _model_info(summary: dict[str, Any], accuracy: float) -> dict[str, Any]:
    """Return the fields of RobustBench's ``model_info`` that an external evaluation changes, and those that identify it."""
    alone = not summary["cascade"] or next(iter(summary["attacks"])) == "autoattack"
    suite = summary["attacks"].get("autoattack") if alone else None
    if suite is not None and (suite.get("failed") or suite["n"] < summary["n"]):
        suite = None  # it is no AutoAttack's
    autoattack = None if suite is None else 100 * suite["accuracy"]
    return identified(summary, 100 * summary["clean"]["accuracy"], accuracy) | {
        "autoattack_acc": None if autoattack is None else f"{autoattack:.2f}",
        "unreliable": autoattack is not None and autoattack - accuracy > 100 * SIGNIFICANT,
    }


def identified(cell: dict[str, Any], clean: float, accuracy: float) -> dict[str, Any]:
    """Return what ``model_info`` says of a cell (`Cell.listed`), its clean and its robust accuracy, in percent."""
    named = {
        "name": "model",
        "vote": "vote",
        "dataset": "dataset",
        "threat_model": "norm",
        "n_examples": "n",
        "draws": "draws",
    }
    said = {key: cell[name] for key, name in named.items()}
    return said | {"eps": repr(cell["eps"]), "clean_acc": f"{clean:.2f}", "external": f"{accuracy:.2f}"}


def heading(manifest: dict[str, Any], cell: dict[str, Any], clean: float, accuracy: float) -> str:
    """Return what the text of a bundle begins with, of a run's only cell; see `identified`."""
    within = f", {cell['within']}" if cell.get("within") else ""
    model, version = in_markdown(cell["model"]), manifest["code"].partition("+")[0]
    return (
        f"# External evaluation of {model}\n\n"
        f"Model: {model} (vote: {in_markdown(cell['vote'])})\n"
        f"Leaderboard: {in_markdown(cell['dataset'])}, {cell['norm']}, eps = {cell['eps']:g}{within}\n"
        f"Robust accuracy: {accuracy:.2f}% of {cell['n']} test images, clean: {clean:.2f}%\n"
        f"Adversarial images: `{IMAGES}`, a float tensor of the first {cell['n']} test images, in their order\n\n"
        f"Method: ensemble-attacks {version}, seed {cell['seed']}; per sample, the worst case of\n"
    )


def _text(ledger: Ledger, summary: dict[str, Any], accuracy: float) -> str:
    rows = "\n".join(
        f"- {in_markdown(called(name, row, summary['n']))}: {100 * row['accuracy']:.2f}%"
        for name, row in summary["attacks"].items()
    )
    absent = lacking(ledger.manifest, {"cells": [summary]})
    rows += "".join(f"\n\nNot complete: {in_markdown(line)}." for line in absent)
    head = heading(ledger.manifest, summary, 100 * summary["clean"]["accuracy"], accuracy)
    return f"{head}{rows}\nRun: digest {run_digest(ledger)}\n"


def text_of(bundle: Path) -> str | None:
    """Return the text of a bundle; ``None`` where it has none.

    Raises:
        ValueError: Where it is too long, or lies where no file is.
    """
    try:
        return read_whole(bundle / TEXT, MOST_JSON).decode(errors="replace") if bundle.is_dir() else None
    except FileNotFoundError:
        return None


def read_bundle(path: Path, box: Box = UNIT) -> tuple[Tensor, dict[str, Any]]:
    """Return the images (N, C, H, W) of a bundle, or inputs (N, ...) in another box, and what is said of them.

    The bundle is a folder that `export_robustbench` wrote, or a ``.pt`` file of one tensor, of which nothing is said. Only
    tensors are unpickled (``weights_only``), of at most 4 GiB.

    Raises:
        FileNotFoundError: Where nothing is there.
        ValueError: Where it holds no tensor of images in [0, 1], or in the box, or too large a file.
    """
    file = path / IMAGES if path.is_dir() else path
    if not os.path.lexists(file):
        raise FileNotFoundError(f"no bundle in {path}: give a folder that holds {IMAGES}, or a .pt file")
    try:
        images = load_tensors(file)
        check_plain(images, "the tensor")
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as one tensor: {error}") from None
    about = file.with_name(ABOUT)
    said: dict[str, Any] = {}
    if path.is_dir() and os.path.lexists(about):
        try:
            said = read_json(about, About)
        except ValueError as error:
            raise ValueError(f"{about} is no description of a bundle: {error}") from None
    if images.dim() < 2 or (box == UNIT and images.dim() != 4) or not len(images) or len(images) > MOST_IMAGES:
        raise ValueError(f"{file} has shape {tuple(images.shape)}: expected images (N, C, H, W)")
    check_images(images, str(file), slack=1e-6 * box.magnitude, box=box)
    return images, said
