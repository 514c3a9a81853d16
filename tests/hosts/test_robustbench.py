"""RobustBench, unforked: our models from its loader, our pipeline in its benchmark, evaluations in its format."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import ensemble_attacks.hosts.robustbench as host
from defenses import load_model, register_with_robustbench
from ensemble_attacks import AutoAttack
from ensemble_attacks.cli.group import main
from ensemble_attacks.hosts.doctor import BROKEN, Finding

pytestmark = pytest.mark.filterwarnings("ignore")  # of what robustbench imports
EPS = 0.03


@pytest.fixture
def four_images(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Instead of CIFAR-10: random images, with the labels that the model gives them."""
    host.ensure()
    import robustbench.data
    from robustbench.model_zoo.enums import BenchmarkDataset

    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = load_model("standard_resnet20_3")(x).argmax(1)
    monkeypatch.setitem(robustbench.data._clean_dataset_loaders, BenchmarkDataset.cifar_10, lambda n, d, p: (x[:n], y[:n]))
    return x, y


def test_robustbench_is_importable_and_nothing_stays_behind() -> None:
    robustbench = host.ensure()
    assert hasattr(robustbench, "benchmark")
    assert "autoattack" not in sys.modules
    assert host.ensure() is robustbench


def test_a_broken_installation_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "robustbench", raising=False)
    clobbered = Finding(
        "robustbench's files", BROKEN, "overwritten by torchattacks' copy", "pip install --no-deps robustbench"
    )
    monkeypatch.setattr(host, "examine", lambda: [clobbered])
    with pytest.raises(ImportError, match=r"overwritten by torchattacks' copy\. Run: pip install --no-deps robustbench"):
        host.ensure()


def test_robustbench_loads_our_models() -> None:
    names = register_with_robustbench()
    assert register_with_robustbench() == names
    assert "Multiresolution_resnet20_1" in names  # which has no vote to choose
    assert "Multiresolution_resnet20_1_voting" not in names
    from robustbench.utils import load_model as their_load_model

    model = their_load_model("Gal_resnet20_3", dataset="cifar10", threat_model="Linf")
    assert model.vote == "softmax"
    assert not model.training
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(x), load_model("gal_resnet20_3")(x))
    assert their_load_model("Gal_resnet20_3_voting", dataset="cifar10", threat_model="Linf").vote == "voting"


def test_a_name_that_robustbench_has_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    host.ensure()
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    from robustbench.model_zoo.models import model_dicts

    zoo = model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf]
    monkeypatch.setitem(zoo, "Gal_resnet20_3", {"model": nn.Identity, "gdrive_id": "theirs"})
    with pytest.raises(ValueError, match="RobustBench has a model 'Gal_resnet20_3' of its own"):
        register_with_robustbench()


def test_benchmark_with_our_pipeline(four_images: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    model = load_model("standard_resnet20_3")
    settings: dict[str, Any] = dict(n_examples=4, eps=EPS, seed=0, attacks_to_run=["torchattacks:FGSM", "mora?steps=20"])
    clean, robust = host.benchmark(model, **settings, aa_state_path=tmp_path / "state")
    assert clean == 1
    assert robust == 0
    assert host.benchmark(model, **settings, aa_state_path=tmp_path / "state") == (clean, robust)
    for bad, message in (({"eps": None}, "eps is None"), ({"attacks_to_run": ["moar"]}, "did you mean 'mora'")):
        with pytest.raises(ValueError, match=message):
            host.benchmark(model, **settings | bad)


def test_the_unforked_benchmark_runs_our_pipeline(four_images: tuple[Tensor, Tensor]) -> None:
    import robustbench.eval

    before = robustbench.eval.AutoAttack
    with host.pipeline("custom", seed=0, attacks_to_run=["mora?steps=20"]) as adversaries:
        _, robust = robustbench.benchmark(load_model("standard_resnet20_3"), n_examples=4, eps=EPS)
    assert robust == adversaries[0].robust_accuracy == 0
    assert isinstance(adversaries[0], AutoAttack)
    assert robustbench.eval.AutoAttack is before


def test_corruptions_are_left_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    import robustbench.eval

    monkeypatch.setattr(robustbench.eval, "corruptions_evaluation", lambda *args: (0.25, 0.5))
    monkeypatch.setattr(
        robustbench.eval, "load_clean_dataset", lambda *args: (torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))
    )
    assert host.benchmark(load_model("standard_resnet20_3"), 2, threat_model="corruptions")[1] == 0.25


def test_an_external_evaluation_is_exported_and_verified(tmp_path: Path) -> None:
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    evaluate = ["evaluate", "--model", "gal_convnet_3", "--vote", "voting", "--eps", "0.1", "--n", "10", "--out", str(run)]
    assert (
        invoke(*evaluate, "--attacks", "torchattacks:PGD?steps=3,mora?steps=10,torchattacks:DeepFool?steps=10").exit_code
        == 0
    )
    assert "asks for all 597" in invoke("export", "robustbench", str(run), "--out", str(bundle)).output
    assert not bundle.exists()
    assert invoke("export", "robustbench", str(run), "--out", str(bundle), "--partial").exit_code == 0
    about = json.loads((bundle / "model_info.json").read_text())
    (summary,) = json.loads((run / "summary.json").read_text())["cells"]
    assert about["external"] == f"{100 * summary['worst_case']['accuracy']:.2f}"
    verify = ("verify", str(bundle), "--model", "gal_convnet_3", "--recraft", "0")
    verified = invoke(*verify)
    assert f"{float(about['external']):.1f}% robust" in verified.output
    (bundle / "model_info.json").write_text(json.dumps(about | {"eps": "1/10"}))
    assert invoke(*verify).output == verified.output
    assert "draws must be at least 1" in invoke("verify", str(bundle), "--model", "gal_convnet_3", "--draws", "0").output
    (bundle / "model_info.json").write_text("[]")
    assert "holds a list" in invoke("verify", str(bundle), "--model", "gal_convnet_3").output
    images = bundle / "adversarial_images.pt"
    anybodys = ("verify", str(images), "--model", "gal_convnet_3", "--dataset", "digits")
    assert "pass --eps" in invoke(*anybodys).output
    assert "leaves the Linf ball" in invoke(*anybodys, "--eps", "0.05").output
    torch.save({"images": torch.load(images), "code": nn.Linear(2, 2)}, images)
    assert "cannot be read as one tensor" in invoke(*anybodys, "--eps", "0.1").output


def test_robustbenchs_readme_with_one_import_changed(cifar10_dir: Path) -> None:
    """Its second example, with a model and a folder that are there, and fewer steps."""
    register_with_robustbench()
    from robustbench.data import load_cifar10
    from robustbench.utils import load_model

    x_test, y_test = load_cifar10(n_examples=5, data_dir=str(cifar10_dir))
    model = load_model(model_name="Adp_resnet20_3", dataset="cifar10", threat_model="Linf")
    from ensemble_attacks import AutoAttack

    adversary = AutoAttack(model, norm="Linf", eps=8 / 255, version="custom", attacks_to_run=["apgd-ce", "apgd-dlr"])
    adversary.apgd.n_restarts, adversary.apgd.n_iter = 1, 20
    x_adv = adversary.run_standard_evaluation(x_test, y_test)
    assert (model(x_adv).argmax(1) == y_test).double().mean() == adversary.robust_accuracy < 0.5


def test_autoattacks_readme_with_one_import_changed(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    """But with fewer steps."""
    from ensemble_attacks import AutoAttack

    images, labels = digits[0][:10], digits[1][:10]
    forward_pass = load_model("standard_convnet_3", dataset="digits").forward
    adversary = AutoAttack(forward_pass, norm="Linf", eps=0.3, version="standard", device="cpu")
    adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = 20
    x_adv = adversary.run_standard_evaluation(images, labels, bs=5)
    dict_adv = adversary.run_standard_evaluation_individual(images, labels, bs=5)
    assert (forward_pass(x_adv).argmax(1) != labels).all()
    assert list(dict_adv) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    custom = AutoAttack(
        forward_pass, norm="Linf", eps=0.3, attacks_to_run=["apgd-ce", "fab"], version="custom", device="cpu"
    )
    custom.apgd.n_restarts, custom.fab.n_restarts, custom.fab.n_iter = 2, 1, 20
    custom.run_standard_evaluation(images, labels, bs=5)
    assert custom.robust_accuracy == 0


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))
