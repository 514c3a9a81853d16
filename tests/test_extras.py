"""Missing extras are told by name at each place; digits are those of scikit-learn; ``defenses`` is ours."""

from __future__ import annotations

import sys
from hashlib import sha256
from importlib.metadata import EntryPoint, requires
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

from defenses import load_model
from ensemble_attacks import extras
from ensemble_attacks.cli import main
from ensemble_attacks.data import load_dataset
from ensemble_attacks.errors import MissingExtraError
from ensemble_attacks.evaluation.engines import ENGINES
from ensemble_attacks.extras import extra, import_timm
from ensemble_attacks.hosts import doctor, robustbench
from ensemble_attacks.models import providers


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)


def test_each_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without(monkeypatch, "timm", "transformers", "ray", "submitit", "jinja2")
    monkeypatch.setattr(doctor, "installed", lambda name: "")
    monkeypatch.delitem(sys.modules, "robustbench", raising=False)
    monkeypatch.delitem(sys.modules, "ensemble_attacks.evaluation.report.pages", raising=False)
    (tmp_path / "config.json").write_text("{}")
    asked = {
        "timm": lambda: providers.load_model("timm:resnet18", dataset="cifar10"),
        "hf": lambda: providers.load_model(f"hf:{tmp_path}", dataset="cifar10"),
        "robustbench": robustbench.ensure,
        "ray": lambda: ENGINES["ray"](None, [], print),  # type: ignore[arg-type]
        "slurm": lambda: ENGINES["slurm"](None, [], print),  # type: ignore[arg-type]
    }
    for name, ask in asked.items():
        with pytest.raises(MissingExtraError, match=rf"pip install 'ensemble-attacks\[{name}\]'"):
            ask()
    told = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert told.exit_code == 2
    assert "a report needs jinja2, which is not installed: pip install 'ensemble-attacks[report]'" in told.output


def test_an_error_of_our_own_modules_is_no_missing_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"ensemble_attacks\.nothing"), extra("report", "a report"):
        import ensemble_attacks.nothing  # type: ignore[import-not-found]  # noqa: F401


def test_an_old_timm_finds_a_new_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub 2 lacks a name that timm 1.0.9 imports; it stands in for the import alone."""
    hub, timm = ModuleType("huggingface_hub"), ModuleType("timm")
    seen = []

    def load(name: str) -> ModuleType:
        if name == "timm":
            seen.append(hasattr(hub, extras.HUB_NAMES[0]))
        return {"huggingface_hub": hub, "timm": timm}[name]

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(extras, "import_module", load)
    assert import_timm("timm:NAME") is timm
    assert seen == [True]
    assert not hasattr(hub, extras.HUB_NAMES[0])


def test_requirements_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["numpy>=1", "timm==1.0.9; extra == 'robustbench'"]
    monkeypatch.setattr(doctor, "requires", lambda name: own if name == doctor.OURS else ["tqdm>99"])
    monkeypatch.setattr(doctor, "installed", {"numpy": "0.9", "timm": "1.0.31", "robustbench": "1.1.1", "tqdm": "4"}.get)
    found = {finding.name: finding for finding in doctor.compare_requirements()}
    assert (found["numpy"].status, found["[robustbench]"].status) == (doctor.BROKEN, doctor.NOTE)
    assert "0.9, but >=1 is needed" in found["numpy"].found
    assert "timm 1.0.31, but ==1.0.9 is needed" in found["[robustbench]"].found
    assert found["tqdm"].status == doctor.NOTE  # a host's pin
    assert found["[slurm]"].status == doctor.ABSENT


def test_the_core_is_light() -> None:
    core = [line for line in requires("ensemble-attacks") or [] if "extra ==" not in line]
    if any(line.startswith("robustbench") for line in core):
        pytest.skip("the metadata are of an earlier installation: make install")
    assert not [line for line in core if line.startswith(("timm", "scikit-learn", "matplotlib", "setuptools"))]


def test_a_folder_called_defenses_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, content in {"my_defenses_a": "", "my_defenses_b": "from my_defenses_b.nothing import x"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    for entry in (EntryPoint("x", "my_defenses_a", providers.GROUP), EntryPoint("x", "my_defenses_a.zoo", providers.GROUP)):
        with pytest.raises(ImportError, match=r"my_defenses_a.__init__\.py is imported as .* rename that file or folder"):
            providers._provider(entry)
    with pytest.raises(ImportError, match="my_defenses_b"):
        providers._provider(EntryPoint("x", "my_defenses_b", providers.GROUP))
    assert providers._provider(EntryPoint("x", "defenses", providers.GROUP)).load_model is load_model


def test_digits_are_scikit_learns() -> None:
    (train_x, train_y), (test_x, test_y) = (load_dataset("digits", split) for split in ("train", "test"))
    images = (16 * torch.cat([train_x, test_x])).to(torch.uint8)
    labels = torch.cat([train_y, test_y]).to(torch.uint8)
    assert (len(train_x), len(test_x)) == (1200, 597)
    found = sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    assert found == "4ade1171f12be22dcc2207fe907d4f31666719948461e4dcbb8061d75266851c"  # made with scikit-learn 1.9.1
