"""Share a finished run, or a model and what it was found to be worth, on the Hugging Face hub, with a card in its format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tabulate import tabulate

from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.report.tables import COLUMNS, in_markdown, table_rows, title_of
from ensemble_attacks.evaluation.summary import finished, run_digest, seconds_of
from ensemble_attacks.extras import extra
from ensemble_attacks.version import __version__

TAGS = ["adversarial-robustness", "ensemble-attacks"]
UNSHARED = ["driving/*", "failed/*", "quarantine/*", "running/*"]  # of a run: who worked on it


def push_to_hub(run: Path, repo: str, *, weights: Path | None = None, private: bool = False, api: Any = None) -> str:
    """Upload a finished run as a dataset, or a model's files with a card of the run's figures; return the page's address.

    Args:
        run: the run's folder.
        repo: the repository, ``user/name``; it is made where it is not there.
        weights: a file or folder of the run's model, which makes the repository one of a model; ``None``: the run is shared,
            adversarial images and all, and is verified by whoever downloads it.
        private: whether a new repository is private.
        api: a `huggingface_hub.HfApi`; ``None``: one that uses the user's own token.

    Raises:
        LedgerError: Where the run is not finished.
        ValueError: Where ``weights`` are given, and the run is of several models.
        FileNotFoundError: Where ``weights`` are not there.
        MissingExtraError: Where huggingface_hub is not installed.
    """
    with extra("hub", "the Hugging Face hub"):
        from huggingface_hub import HfApi
    ledger = Ledger(run)
    summary = finished(ledger)
    models = ledger.manifest["sweep"]["models"]
    if weights is not None and len(models) > 1:
        raise ValueError(f"{run} is of {len(models)} models, --weights are those of one: choose a run of one")
    if weights is not None and not weights.exists():
        raise FileNotFoundError(f"there is no {weights}: name the model's file, or the folder of its files")
    api = api or HfApi()
    kind = "dataset" if weights is None else "model"
    url = str(api.create_repo(repo, repo_type=kind, private=private, exist_ok=True))
    to: dict[str, Any] = {"repo_id": repo, "repo_type": kind}
    card = (run_card if weights is None else model_card)(ledger, summary)
    api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", **to)
    shared = run if weights is None else weights
    if shared.is_dir():
        api.upload_folder(folder_path=str(shared), ignore_patterns=["README.md", *UNSHARED], **to)
    else:
        api.upload_file(path_or_fileobj=str(shared), path_in_repo=shared.name, **to)
    return url


def run_card(ledger: Ledger, summary: dict[str, Any]) -> str:
    """Return a run's card, in the format of the hub's datasets."""
    with extra("hub", "the Hugging Face hub"):
        from huggingface_hub import DatasetCardData
    return _card(DatasetCardData(tags=TAGS), ledger, summary)


def model_card(ledger: Ledger, summary: dict[str, Any]) -> str:
    """Return the card of a run's model, in the format of the hub's models, with clean and robust accuracy as results."""
    with extra("hub", "the Hugging Face hub"):
        from huggingface_hub import EvalResult, ModelCardData
    sweep = ledger.manifest["sweep"]
    about = {"task_type": "image-classification", "dataset_type": sweep["dataset"], "dataset_name": sweep["dataset"]}
    results = []
    for cell in summary["cells"]:
        rows = {"accuracy": cell["clean"], f"accuracy, {cell['norm']} {cell['eps']}, {cell['vote']}": cell.get("worst_case")}
        named = {name: row for name, row in rows.items() if row is not None}
        results += [
            EvalResult(**about, metric_type="accuracy", metric_name=name, metric_value=round(100 * row["accuracy"], 2))
            for name, row in named.items()
        ]
    return _card(ModelCardData(model_name=sweep["models"][0], tags=TAGS, eval_results=results), ledger, summary)


def _card(data: Any, ledger: Ledger, summary: dict[str, Any]) -> str:
    """Return a card: the hub's metadata, the comparison, and how to check it."""
    rows = [[in_markdown(value) for value in row] for row in table_rows(summary, seconds_of(ledger))]
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {in_markdown(title_of(ledger.manifest))}",
        "What each attack leaves robust (%), with its 95% interval; the last row is the worst case of each image.",
        tabulate(rows, COLUMNS, tablefmt="github"),
        f"Evaluated by ensemble-attacks {__version__}, digest `{run_digest(ledger)}`. To compute it anew from the "
        "images, the model and the data alone: `ensemble-attacks verify RUN`.",
    ]
    return "\n\n".join(lines) + "\n"
