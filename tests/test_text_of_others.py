"""Names and errors that others chose are text wherever they are printed: terminal, log, Markdown, CSV, HTML."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torchattacks.attack import Attack

from ensemble_attacks import AutoAttack
from ensemble_attacks.cli.group import Plain, main
from ensemble_attacks.evaluation import runner

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what matplotlib imports
NASTY = "\x1b[31m[red]|[x](y)`<script>\u202e"
NETS = """
import torch
from torch import nn
def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
"""


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code in (0, 1, 2), result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model whose file is called so, of which one attack was given up with an error that says so."""
    folder = tmp_path_factory.mktemp("others")
    (folder / f"{NASTY}nets.py".replace("/", "")).write_text(NETS)
    images = np.random.default_rng(0).random((4, 3, 4, 4), dtype=np.float32)
    np.savez(folder / "data.npz", images=images, labels=np.zeros(4, dtype=np.int64))
    return folder


def model_in(place: Path) -> str:
    return f"{next(place.glob('*.py'))}:make"


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    before = runner._attack

    def failing(*arguments: object) -> object:
        if arguments[4] == "torchattacks:PGD":
            raise RuntimeError(NASTY)
        return before(*arguments)  # type: ignore[arg-type]

    attacks = "torchattacks:FGSM,torchattacks:PGD"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner, "_attack", failing)
        given = ("--model", model_in(place), "--data", place / "data.npz", "--eps", "0.1", "--attacks", attacks)
        told = invoke("evaluate", *given, "--out", place / "run")
    check_terminal(told)
    return place / "run"


def check_terminal(text: str) -> None:
    assert not [c for c in text if not (c.isprintable() or c in "\n\t")]
    assert "[red]" in text.replace("\n", "")


COMMANDS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "status": lambda place, run: ("status", run),
    "verify": lambda place, run: ("verify", run),
    "a model that is not there": lambda place, run: ("evaluate", "--model", NASTY, "--eps", "0.1"),
    "an attack that is not there": lambda place, run: (
        "evaluate",
        "--model",
        "gal_convnet_3",
        "--eps",
        "0.1",
        "--attacks",
        NASTY,
    ),
    "data that are not there": lambda place, run: ("evaluate", "--model", "gal_convnet_3", "--eps", "0.1", "--data", NASTY),
    "a run that is not there": lambda place, run: ("status", place / NASTY),
    "a sweep": lambda place, run: ("sweep", place / NASTY),
    "a recipe": lambda place, run: ("train", NASTY, "--out", place / "none"),
    "diagnose": lambda place, run: (
        *("diagnose", "--model", model_in(place), "--data", place / "data.npz", "--eps", "0.1", "--n", "4"),
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_terminal_gets_text(name: str, place: Path, run: Path) -> None:
    check_terminal(invoke(*COMMANDS[name](place, run)))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.scripts += tag == "script"


def test_pages_and_tables_get_text(place: Path, run: Path) -> None:
    check_terminal(invoke("report", run, "--out", folder := place / f"{NASTY}report".replace("/", "")))
    page = (folder / "report.html").read_text()
    assert "[red]|[x](y)`&lt;script&gt;" in page
    own, other = Tags(), Tags()
    own.feed(page)
    other.feed(page.replace("&lt;script&gt;", ""))
    assert own.scripts == other.scripts  # none of the name's
    text = (folder / "report.md").read_text().partition("## How to run it again")[0]
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert "[x](y)" not in text.replace("\\[x\\](y)", "")
    assert "|[x" not in text
    with (folder / "table.csv").open() as file:
        assert {row["model"] for row in csv.DictReader(file)} == {model_in(place)}


def test_a_bundle_gets_text(place: Path, run: Path) -> None:
    folder = place / f"{NASTY}bundle".replace("/", "")
    check_terminal(invoke("export", "robustbench", run, "--out", folder, "--partial"))
    text = (folder / "evaluation.md").read_text()
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert "\\[red\\]" in text


class Named(Attack):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(NASTY, model)
        self.supported_mode = ["default"]

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError(NASTY)


def test_a_log_gets_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("x", logging.WARNING, "x", 1, "%s failed: %s", (NASTY, f"a\n{NASTY}"), None)
    assert Plain("%(message)s").format(record).count("\\x1b[31m") == 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    x = torch.rand(4, 3, 4, 4)
    adversary = AutoAttack(model, eps=0.1, attacks_to_run=["apgd-ce", Named(model)], log_path=tmp_path / "log")
    adversary.run_standard_evaluation(x, model(x).argmax(1), bs=4)
    for text in (capsys.readouterr().out, (tmp_path / "log").read_text()):
        assert "\\x1b[31m" in text
        assert "\x1b" not in text
