"""What a command tells while it works, and when it is stopped."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from ensemble_attacks.cli import drive, main
from ensemble_attacks.data import load_dataset
from ensemble_attacks.diagnostics import diagnose
from ensemble_attacks.evaluation import runner
from ensemble_attacks.evaluation.settings import Settings
from ensemble_attacks.models import providers


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_way_to_go_on_is_told_as_soon_as_there_is_a_run(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the signal comes while the plan is being made, before any attack."""

    def stopped(*_: Any) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(drive, "set_threads", lambda *_: None)
    monkeypatch.setattr(drive, "plan_of", stopped)
    arguments = ["evaluate", "--model", "gal_convnet_3", "--eps", "0.1", "--n", "4", "--out", str(tmp_path / "run")]
    before, interrupts = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:  # a job in the background of a shell ignores interrupts
        told = CliRunner().invoke(main, arguments)
    finally:
        signal.signal(signal.SIGINT, interrupts)
    assert told.exit_code == code
    assert f"`ensemble-attacks resume {tmp_path / 'run'}`, goes on" in told.output
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_passes_of_the_checks_are_told_as_they_are_made() -> None:
    x = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 3
    told: list[int] = []
    found = diagnose(torch.nn.Linear(4, 3), x, y, eps=0.1, on_pass=told.append)
    assert sum(told) >= found.passes * len(x) > 0  # the passes of the checks' own checks are told, too, but not counted


@pytest.mark.parametrize(("parent", "silent"), [(None, None), (object(), True)])
def test_workers_leave_the_terminal_to_their_parent(
    parent: object, silent: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[dict[str, Any]] = []

    def bar(**arguments: Any) -> Any:
        bars.append(arguments)
        return drawn(**arguments | {"disable": True})

    drawn = runner.tqdm
    monkeypatch.setattr(runner, "tqdm", bar)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    x, y = load_dataset("digits", n=4)
    model = providers.load_model("gal_convnet_3", dataset="digits")
    runner.evaluate(model, x, y, ["torchattacks:FGSM"], Settings(eps=0.1))
    assert [(found["desc"], found["disable"]) for found in bars] == [("torchattacks:FGSM", silent)]
