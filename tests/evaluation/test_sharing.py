"""What trackers of experiments and the Hugging Face hub are told; offline, with stand-ins that keep it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from ensemble_attacks import LedgerError, evaluate
from ensemble_attacks.errors import MissingExtraError
from ensemble_attacks.evaluation.hub import push_to_hub
from ensemble_attacks.evaluation.ledger import MANIFEST, Ledger
from ensemble_attacks.evaluation.summary import finished, run_digest
from ensemble_attacks.evaluation.tracking import MODULES
from tests.evaluation.test_runner import invoke

ASKED: dict[str, Any] = {"eps": 0.3, "attacks": "pgd?steps=2", "n": 6, "batch_size": 6}
NAME = "gal_convnet_3/softmax/0.3/0/worst case/robust"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluate("gal_convnet_3", "digits", out=tmp_path_factory.mktemp("sharing") / "run", **ASKED).folder


def worst(run: Path) -> float:
    (cell,) = finished(Ledger(run))["cells"]
    return 100 * cell["worst_case"]["accuracy"]


@pytest.mark.parametrize("tracker", MODULES)
def test_a_tracker_is_told_the_figures_and_the_digest(tracker: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = MagicMock()
    monkeypatch.setitem(sys.modules, MODULES[tracker], module)
    evaluate("gal_convnet_3", "digits", out=run, log=tracker, **ASKED)
    told = {
        "wandb": lambda: module.init.return_value.log.call_args.args[0],
        "tensorboard": lambda: dict(call.args for call in module.SummaryWriter.return_value.add_scalar.call_args_list),
        "mlflow": lambda: module.log_metrics.call_args.args[0],
    }[tracker]()
    assert told[NAME] == pytest.approx(worst(run), abs=0.05)
    assert run_digest(Ledger(run)) in str(module.mock_calls)


def test_a_tracker_that_is_not_there_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match="wandb"):
        evaluate("gal_convnet_3", "digits", out=tmp_path / "run", log="wandb", **ASKED)
    with pytest.raises(ValueError, match="'tensorbord'"):
        evaluate("gal_convnet_3", "digits", out=tmp_path / "run", log="tensorbord", **ASKED)
    said = invoke("evaluate", "--model", "gal_convnet_3", "--data", "digits", "--eps", 0.3, "--log", "wandb", "--n", 6)
    assert said.exit_code == 2
    assert "ensemble-attacks[wandb]" in said.output
    assert not list(tmp_path.iterdir())


def test_a_run_and_its_model_are_shared_with_a_card(run: Path, tmp_path: Path) -> None:
    api = MagicMock()
    api.create_repo.return_value = "https://huggingface.co/datasets/me/run"
    assert push_to_hub(run, "me/run", api=api) == "https://huggingface.co/datasets/me/run"
    assert api.create_repo.call_args.kwargs["repo_type"] == "dataset"
    assert api.upload_folder.call_args.kwargs["folder_path"] == str(run)
    card = api.upload_file.call_args.kwargs["path_or_fileobj"].decode()
    assert run_digest(Ledger(run)) in card
    weights = tmp_path / "net.safetensors"
    weights.touch()
    api = MagicMock()
    push_to_hub(run, "me/net", weights=weights, api=api)
    card, file = (call.kwargs["path_or_fileobj"] for call in api.upload_file.call_args_list)
    assert file == str(weights)
    hub = pytest.importorskip("huggingface_hub")
    found = hub.ModelCard(card.decode()).data.eval_results
    assert [result.metric_value for result in found][-1] == pytest.approx(worst(run), abs=0.01)
    assert found[-1].metric_name == "accuracy, Linf 0.3, softmax"


def test_what_cannot_be_shared_is_told_before_anything_is(run: Path, tmp_path: Path) -> None:
    api = SimpleNamespace()  # which has nothing to call
    with pytest.raises(FileNotFoundError, match="there is no"):
        push_to_hub(run, "me/net", weights=tmp_path / "none", api=api)
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(run / MANIFEST, begun)
    with pytest.raises(LedgerError, match="not finished"):
        push_to_hub(begun, "me/run", api=api)
