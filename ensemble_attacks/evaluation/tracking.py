"""Tell a tracker of experiments what a run has found: Weights & Biases, TensorBoard or MLflow, where these are installed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import closing
from importlib import import_module
from typing import Any

from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.report.tables import COLUMNS, table_rows
from ensemble_attacks.evaluation.summary import run_digest
from ensemble_attacks.extras import extra, silenced
from ensemble_attacks.validation import check_choice

PROJECT = "ensemble-attacks"  # under which runs are found there
MODULES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow"}
FIGURES = {"robust %": "robust", "low": "low", "high": "high", "passes / image": "passes per image"}  # by column: its name


def check_tracker(name: str) -> None:
    """Raise where a tracker is unknown, or not installed; before any work.

    Raises:
        ValueError: Where it is unknown.
        MissingExtraError: Where its package cannot be imported.
    """
    check_choice("log", name, tuple(MODULES))
    with extra(name, f"--log {name}"), silenced():
        import_module(MODULES[name])


def log_run(ledger: Ledger, summary: dict[str, Any], tracker: str) -> None:
    """Log what a run has found: the figures of each attack (%), the settings, and the digest.

    A figure is called ``model/vote/eps/seed/attack/figure``. TensorBoard's files lie beside the run's folder, in one of the
    same name and ``.tensorboard``.
    """
    check_tracker(tracker)
    module = import_module(MODULES[tracker])
    settings = {key: value for key, value in ledger.manifest["sweep"].items() if value is not None}
    LOGGERS[tracker](module, ledger, figures(summary), settings | {"digest": run_digest(ledger)})


def figures(summary: dict[str, Any]) -> dict[str, float]:
    """Return the figures of a summary by name."""
    found: dict[str, float] = {}
    for values in table_rows(summary, {}):
        row = dict(zip(COLUMNS, values, strict=True))
        of = "/".join(_name(row[key]) for key in ("model", "vote", "eps", "seed", "attack"))
        found |= {f"{of}/{name}": float(row[key]) for key, name in FIGURES.items() if row[key] != ""}
    return found


def _name(part: object) -> str:
    """Return a part of a figure's name, of characters that all trackers take."""
    return re.sub(r"[^\w. -]+", "_", str(part)).strip("_ ")


def _wandb(wandb: Any, ledger: Ledger, found: dict[str, float], settings: dict[str, Any]) -> None:
    run = wandb.init(project=PROJECT, name=ledger.folder.name, config=settings)
    run.log(found)
    run.finish()


def _tensorboard(tensorboard: Any, ledger: Ledger, found: dict[str, float], settings: dict[str, Any]) -> None:
    folder = ledger.folder.resolve()
    with closing(tensorboard.SummaryWriter(str(folder.with_name(f"{folder.name}.tensorboard")))) as writer:
        writer.add_text("settings", f"```\n{json.dumps(settings, indent=2)}\n```")
        for name, value in found.items():
            writer.add_scalar(name, value)


def _mlflow(mlflow: Any, ledger: Ledger, found: dict[str, float], settings: dict[str, Any]) -> None:
    mlflow.set_experiment(PROJECT)
    with mlflow.start_run(run_name=ledger.folder.name):
        mlflow.log_params({key: json.dumps(value) for key, value in settings.items()})
        mlflow.log_metrics(found)


LOGGERS: dict[str, Callable[[Any, Ledger, dict[str, float], dict[str, Any]], None]] = {
    "wandb": _wandb,
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
}
