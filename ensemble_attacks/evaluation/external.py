"""Write and read RobustBench's external evaluations: a bundle to submit, and anybody's bundle to be judged.

RobustBench asks (issue template "new external evaluation") for the model, the adversarial images as a ``.pt`` tensor the
size of the test set, the robust accuracy, and how the images were made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble_attacks.data import DATASETS
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.summary import summarise
from ensemble_attacks.evaluation.units import chains_of
from ensemble_attacks.files import load_tensors
from ensemble_attacks.validation import check_images
from ensemble_attacks.version import __version__

IMAGES, ABOUT, TEXT = "adversarial_images.pt", "model_info.json", "evaluation.md"
SIGNIFICANT = 0.001  # of robust accuracy, by which an evaluation must be below AutoAttack's to be RobustBench's "external"


def export_robustbench(run: Path, out: Path, *, partial: bool = False) -> Path:
    """Write the bundle of a finished ``evaluate`` run: of every sample, the image that is least often right.

    Args:
        run: the folder of a finished ``evaluate``.
        out: a new folder.
        partial: whether a run on fewer images than the test set has may be exported, which RobustBench does not take.

    Returns:
        The path ``out``.

    Raises:
        FileNotFoundError: Where ``run`` holds no run.
        FileExistsError: Where ``out`` is there already.
        ValueError: Where the run is not finished, of several cells, or not of the whole test set.
    """
    ledger = Ledger(run)
    cells = summarise(ledger)["cells"]
    if len(cells) > 1:
        raise ValueError(f"{run} holds {len(cells)} cells, a bundle is of one: export a run of `evaluate`")
    (summary,) = cells
    if missing := summary.get("missing"):
        raise ValueError(f"{run} is not finished: {missing[0]} is missing, run it again")
    whole = ledger.manifest.get("images") or DATASETS[summary["dataset"]].test_images
    if summary["n"] != whole and not partial:
        raise ValueError(
            f"{run} attacked {summary['n']} images, RobustBench asks for all {whole} of {summary['dataset']}: evaluate "
            "without --n, or export what there is with --partial"
        )
    if ledger.manifest.get("rows") is not None:
        raise ValueError(f"{run} is of a choice of images (--first, --sample, --only-correct), a bundle of the first ones")
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another folder (--out)")
    images, right = _worst_case(ledger)
    accuracy = 100 * right.mean().item()
    out.mkdir(parents=True)
    torch.save(images, out / IMAGES)
    (out / ABOUT).write_text(json.dumps(_model_info(summary, accuracy), indent=2) + "\n")
    (out / TEXT).write_text(_text(summary, accuracy))
    return out


def _worst_case(ledger: Ledger) -> tuple[Tensor, Tensor]:
    """Return every sample's image that is least often right, by default the clean one, and its share of right draws."""
    images, rights = [], []
    for chain in chains_of(ledger.manifest):
        results = [result for unit in chain if (result := ledger.read(unit))]
        chosen, right = results[0].tensors["x_adv"].clone(), results[0].tensors["right"].clone()
        for result in results[1:]:
            rows, found = result.tensors["rows"], result.tensors["correct"].double().mean(0)
            better = (found < right[rows]) & ~result.tensors["invalid"].bool()
            chosen[rows[better]], right[rows[better]] = result.tensors["x_adv"][better], found[better]
        images.append(chosen)
        rights.append(right)
    return torch.cat(images), torch.cat(rights)


def _model_info(summary: dict[str, Any], accuracy: float) -> dict[str, Any]:
    """Return the fields of RobustBench's ``model_info`` that an external evaluation changes, and those that identify it."""
    alone = not summary["cascade"] or next(iter(summary["attacks"])) == "autoattack"
    suite = summary["attacks"].get("autoattack") if alone else None
    autoattack = None if suite is None or suite.get("failed") else 100 * suite["accuracy"]
    return {
        "name": summary["model"],
        "vote": summary.get("vote"),
        "dataset": summary["dataset"],
        "threat_model": summary["norm"],
        "eps": repr(summary["eps"]),
        "n_examples": summary["n"],
        "draws": summary["draws"],
        "clean_acc": f"{100 * summary['clean']['accuracy']:.2f}",
        "autoattack_acc": None if autoattack is None else f"{autoattack:.2f}",
        "external": f"{accuracy:.2f}",
        "unreliable": autoattack is not None and autoattack - accuracy > 100 * SIGNIFICANT,
    }


def _text(summary: dict[str, Any], accuracy: float) -> str:
    rows = "\n".join(f"- {name}: {100 * row['accuracy']:.2f}%" for name, row in summary["attacks"].items())
    return (
        f"# External evaluation of {summary['model']}\n\n"
        f"Model: {summary['model']} (vote: {summary.get('vote')})\n"
        f"Leaderboard: {summary['dataset']}, {summary['norm']}, eps = {summary['eps']:g}\n"
        f"Robust accuracy: {accuracy:.2f}% of {summary['n']} test images, clean: {100 * summary['clean']['accuracy']:.2f}%\n"
        f"Adversarial images: `{IMAGES}`, a float tensor of the first {summary['n']} test images, in their order\n\n"
        f"Method: ensemble-attacks {__version__}, seed {summary['seed']}; per sample, the worst case of\n{rows}\n"
    )


def read_bundle(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Return the images (N, C, H, W) of a bundle, and what is said of them.

    The bundle is a folder that `export_robustbench` wrote, or a ``.pt`` file of one tensor, of which nothing is said. Only
    tensors are unpickled (``weights_only``), of at most 4 GiB.

    Raises:
        FileNotFoundError: Where nothing is there.
        ValueError: Where it holds no tensor of images in [0, 1], or too large a file.
    """
    file = path / IMAGES if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"no bundle in {path}: give a folder that holds {IMAGES}, or a .pt file")
    try:
        images = load_tensors(file)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as one tensor: {error}") from None
    check_images(images, str(file), slack=1e-6)
    about = file.with_name(ABOUT)
    said = json.loads(about.read_text()) if path.is_dir() and about.exists() else {}
    if not isinstance(said, dict):
        raise ValueError(f"{about} holds a {type(said).__name__}: expected an object with eps, dataset and so on")
    return images, said
