"""What a run tells beside itself (a report, a bundle) is held against it; what others named is shown, and does nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from ensemble_attacks import judge
from ensemble_attacks.cli.console import shown
from ensemble_attacks.cli.group import main
from ensemble_attacks.data import load_dataset
from ensemble_attacks.errors import out_of_memory
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.external import IMAGES, compare_bundle, export_robustbench
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.report import compare
from ensemble_attacks.evaluation.report.compare import compare_report
from ensemble_attacks.evaluation.report.pages import write_report
from ensemble_attacks.evaluation.report.tables import in_markdown, write_csv
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.settings import Settings
from ensemble_attacks.threat import number
from tests.evaluation.test_ledger import ledger_in

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what matplotlib imports
Change = Callable[[Path], object]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(ledger_in(folder, attacks=("torchattacks:FGSM", "ea-apgd-ce"), n=6, shard_size=3))
    return folder


def replaced(name: str, before: str, after: str, folder: Path) -> None:
    path = folder / name
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def changed_images(change: Callable[[Tensor], Tensor], folder: Path) -> None:
    torch.save(change(torch.load(folder / IMAGES, weights_only=True)).clone(), folder / IMAGES)


def numbers_of(path: Path) -> list[str]:
    """Return the numbers of a text as they stand in it, each once, with what is around them."""
    return sorted(set(re.findall(r"[ ,:|>\"]\d+\.\d+[%,|<\"\s]", path.read_text())))


def test_every_forged_figure_of_a_bundle_is_caught(finished: Path, tmp_path: Path) -> None:
    bundle = export_robustbench(finished, tmp_path / "bundle", partial=True)
    ledger = Ledger(finished)
    assert compare_bundle(ledger, bundle) == []
    forgeries: dict[str, Change] = {}
    about = json.loads((bundle / "model_info.json").read_text())
    for key, value in about.items():
        for other in ("0.00", 1, None, True):
            if other != value:
                forgeries[f"{key} = {other}"] = partial(_say, about | {key: other})
    for text in numbers_of(bundle / "evaluation.md"):
        forgeries[f"evaluation.md {text}"] = partial(replaced, "evaluation.md", text, f"{text[0]}1.23{text[-1]}")
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "clean": torch.zeros_like,
        "reversed": lambda x: x.flip(0),
        "fewer": lambda x: x[1:],
        "one pixel": lambda x: torch.cat([x[:-1], (x[-1:] + 1e-7).clamp(0, 1)]),
        "double": lambda x: x.double(),
    }
    forgeries |= {f"images {how}": partial(changed_images, change) for how, change in changes.items()}
    assert len(forgeries) >= 40
    missed = []
    for name, forge in forgeries.items():
        shutil.copytree(bundle, folder := tmp_path / "forged")
        forge(folder)
        with suppress(ValueError):
            missed += [] if compare_bundle(ledger, folder) else [name]
        shutil.rmtree(folder)
    assert not missed


def _say(content: dict[str, Any], folder: Path) -> None:
    (folder / "model_info.json").write_text(json.dumps(content, indent=2))


def test_a_bundle_by_itself(finished: Path, tmp_path: Path) -> None:
    bundle = export_robustbench(finished, tmp_path / "bundle", partial=True)
    told = invoke("verify", bundle, "--model", "gal_convnet_3", "--recraft", "2")
    assert told.exit_code == 0, told.output
    assert "crafted anew: " in told.output
    assert "not verifiable: " in told.output
    weaker = tmp_path / "weaker"
    shutil.copytree(bundle, weaker)
    torch.save(load_dataset("digits", n=6)[0], weaker / IMAGES)
    about = json.loads((bundle / "model_info.json").read_text())
    _say(about | {"external": about["clean_acc"], "unreliable": False}, weaker)
    said = ("Robust accuracy: {external}%".format(**about), "Robust accuracy: {clean_acc}%".format(**about))
    replaced("evaluation.md", *said, weaker)
    told = invoke("verify", weaker, "--model", "gal_convnet_3")
    assert told.exit_code == 1
    assert "are not those that the attacks make" in told.output.replace("\n", "")
    replaced("model_info.json", f'"external": "{about["external"]}"', '"external": "99.00"', bundle)
    told = invoke("verify", bundle, "--model", "gal_convnet_3")
    assert told.exit_code == 1
    assert "external = 99.00, computed anew" in told.output.replace("\n", "")


@pytest.mark.slow
def test_every_forged_figure_of_a_report_is_caught(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(finished, honest := tmp_path / "report")

    def copied(ledger: Ledger, out: Path, *, device: str) -> None:
        shutil.copytree(honest, out)

    assert compare_report(Ledger(finished), honest) == ([], [])
    monkeypatch.setattr(compare, "write_report", copied)  # it is the same again, as has just been seen
    forgeries: dict[str, Change] = {}
    for name in ("report.md", "report.html", "table.csv"):
        for text in numbers_of(honest / name):
            forgeries[f"{name} {text}"] = partial(replaced, name, text, f"{text[0]}12.3{text[-1]}")
    for path in sorted((honest / "figures").glob("*.csv")):
        for text in numbers_of(path)[:5]:
            name = f"figures/{path.name}"
            forgeries[f"{name} {text}"] = partial(replaced, name, text, f"{text[0]}77.7{text[-1]}")
    forgeries["a file more"] = lambda folder: (folder / "more.md").write_text("x")
    forgeries["a file less"] = lambda folder: (folder / "table.csv").unlink()
    assert len(forgeries) >= 40
    missed = []
    for name, forge in forgeries.items():
        shutil.copytree(honest, folder := tmp_path / "forged")
        forge(folder)
        missed += [] if compare_report(Ledger(finished), folder)[0] else [name]
        shutil.rmtree(folder)
    assert not missed
    picture = next((honest / "figures").glob("*.png"))
    shutil.copytree(honest, folder := tmp_path / "drawn")
    (folder / "figures" / picture.name).write_bytes(b"another")
    assert compare_report(Ledger(finished), folder) == ([], [f"figures/{picture.name}"])


def test_text_of_others_is_text(tmp_path: Path) -> None:
    assert shown("\x1b[31m[red]x") == "\\x1b[31m\\[red]x"
    assert "\x1b" not in shown("\x9b\x1b]0;title\x07\u202e")
    write_csv(tmp_path / "t.csv", ("a",), [("\t=1+1",), (" =1",), ("+1",), (-1.5,)])
    assert (tmp_path / "t.csv").read_text().splitlines() == ["a", "'\t=1+1", "' =1", "'+1", "-1.5"]
    assert in_markdown("a|b\n<script>[x](y)`") == "a\\|b \\<script\\>\\[x\\](y)\\`"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--out", ""), "name a folder"),
        (("--device", "meta"), "cannot be used here"),
        (("--eps", "1" * 401), "eps must be a finite number above 0"),
        (("--attacks", "torchattacks:PGD?steps=abc"), "option steps of torchattacks' PGD is 'abc'"),
        (("--attacks", "torchattacks:PGD?eps=1e999"), "expected a finite number"),
        (("--seed", "9" * 401), "seed must be below"),
        (("--n", "9" * 401), "has 597 images"),
        (("--model", "\x1b[31mred"), "[31mred"),
    ],
)
def test_bad_options_are_told_before_any_work(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    given = ("evaluate", "--model", "gal_convnet_3", "--eps", "0.1", "--n", "4", "--attacks", "torchattacks:FGSM")
    result = invoke(*given, "--out", tmp_path / "run", *change)
    assert result.exit_code == 2
    assert message in result.output
    assert "\x1b" not in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["9" * 401, "1e9999999", "nan", "0x1", "1/0", "-1", "", "__import__('os')", "1e99999"])
def test_radii_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no number"):
        number(text)


class Liar(Tensor):
    """It says of every distance that it is 0."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.sub:
            return torch.zeros(args[0].shape)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_the_judge_measures_a_subclass_as_what_it_holds() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.full((2, 1, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="leaves the Linf ball"):
        judge(model, x, y, (x + 0.4).as_subclass(Liar), eps=0.1)
    with pytest.raises(ValueError, match="leaves the Linf ball"):  # the slack of rounding is no more than eps
        judge(model, x, y, x + 1e-7, eps=1e-9)


class Unsound(nn.Module):
    """NaN for whatever has moved."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))

    def forward(self, x: Tensor) -> Tensor:
        moved = ((x * 255).round() - x * 255).abs().flatten(1).amax(1, keepdim=True) > 1e-3
        return torch.where(moved & (not torch.is_grad_enabled()), torch.nan, self.net(x))


def test_a_worst_case_lies_above_no_attack() -> None:
    torch.manual_seed(0)
    model = Unsound().eval()
    x = (255 * torch.rand(8, 1, 6, 6)).round() / 255
    y = model(x).argmax(1)
    summary = evaluate(model, x, y, ["torchattacks:FGSM"], Settings(eps=0.1))
    row, worst = summary["attacks"]["torchattacks:FGSM"], summary["worst_case"]
    assert row["invalid"] > 0
    assert worst["accuracy"] <= row["accuracy"]
    assert worst["invalid"] == row["invalid"]


class TwoFaced(nn.Module):
    """It answers otherwise where nobody asks for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.net(x)
        return scores if torch.is_grad_enabled() else self.net((x * 10).round() / 10)


def test_what_the_attack_and_not_the_judge_sees_is_told(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = TwoFaced().eval()
    x = (torch.rand(16, 1, 6, 6) * 10).round() / 10
    y = model(x).argmax(1)
    row = evaluate(model, x, y, ["ea-apgd-ce"], Settings(eps=0.04))["attacks"]["ea-apgd-ce"]
    assert 0 < row["disagreement"] <= row["robust"]
    assert "answers the judge otherwise than the attack" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError("Unable to allocate 1.0 GiB for an array"),
    ],
)
def test_memory_that_ran_out_is_known_by_any_words(error: BaseException) -> None:
    assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
