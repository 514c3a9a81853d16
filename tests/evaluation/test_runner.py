"""The whole chain: evaluate on real digits, from the command line, judged and stored."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from defenses import load_model
from defenses.frontend import FRONT_ENDED
from defenses.randomized import RandomizedEnsemble
from defenses.zoo.cards import make_ensemble as make_zoo_ensemble
from ensemble_attacks import AutoAttack, NotAnEnsembleError, OutOfBallError, judge
from ensemble_attacks.cli.group import main
from ensemble_attacks.data import load_dataset
from ensemble_attacks.evaluation import runner, suite
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.ledger import Result as Stored
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.suite import Crafted, Settings
from ensemble_attacks.evaluation.units import chains_of
from ensemble_attacks.models.parts import find_parts
from ensemble_attacks.models.passes import count_passes
from ensemble_attacks.models.twins import prepare
from tests.evaluation.test_ledger import read
from tests.helpers import VOTES, slow_but


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


ATTACKS = "mora?steps=20,apgd-ce?steps=20"
EVALUATE = ("evaluate", "--model", "adp_convnet_3", "--dataset", "digits", "--eps", "0.12", "--n", "20")


def test_evaluate_stores_what_the_judge_confirms(tmp_path: Path) -> None:
    result = invoke(
        *EVALUATE, "--vote", "voting", "--attacks", "mora?steps=20,ea-apgd-ce?steps=20", "--out", tmp_path / "run"
    )
    assert result.exit_code == 0, result.output
    assert "mora" in result.output
    assert "worst case" in result.output
    (summary,) = json.loads((tmp_path / "run" / "summary.json").read_text())["cells"]
    x, y = load_dataset("digits", n=20)
    model = load_model("adp_convnet_3", dataset="digits", vote="voting")
    robust = torch.ones(20, dtype=torch.bool)
    for name, stored in stored_in(tmp_path / "run").items():
        verdict = judge(model, x, y, stored.tensors["x_adv"], eps=0.12)
        assert torch.equal(verdict.robust, stored.tensors["robust"].bool())
        row = summary["clean"] if name == "clean" else summary["attacks"][name]
        assert row["robust"] == int(verdict.robust.sum())
        assert row["forwards_per_image"] > 1 or name == "clean"
        robust &= verdict.robust
    assert summary["worst_case"]["robust"] == int(robust.sum())


def stored_in(run: Path) -> dict[str, Stored]:
    ledger = Ledger(run)
    (chain,) = chains_of(ledger.manifest)
    return {unit.content["attack"]: read(ledger, unit) for unit in chain}


def test_a_suites_parts_and_the_trace_agree_with_the_whole(tmp_path: Path) -> None:
    result = invoke(
        *EVALUATE, "--n", 6, "--attacks", "mora?steps=12,mora-mt?steps=12", "--batch-size", "4", "--out", tmp_path / "run"
    )
    assert result.exit_code == 0, result.output
    (cell,) = json.loads((tmp_path / "run" / "summary.json").read_text())["cells"]
    part, whole = (cell["attacks"][name] for name in ("mora?steps=12", "mora-mt?steps=12"))
    assert whole["stages"]["mora"]["robust"] == part["robust"] >= whole["robust"]
    assert whole["stages"]["mora"]["forwards_per_image"] == part["forwards_per_image"]
    trace = stored_in(tmp_path / "run")["mora-mt?steps=12"].info["trace"]
    assert trace[-1]["robust"] == whole["robust"]
    assert sum(row["forwards"] for row in trace) == pytest.approx(6 * whole["forwards_per_image"])
    assert sum(row["backwards"] for row in trace) == pytest.approx(6 * whole["backwards_per_image"])
    assert sum(row["fooled"] for row in trace) == 6 - trace[-1]["robust"]


def test_the_same_run_gives_the_same_summary_and_images(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        assert invoke(*EVALUATE, "--eps", "0.2", "--attacks", ATTACKS, "--out", tmp_path / folder).exit_code == 0
    names = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a" / "units").glob("*.safetensors")]
    assert len(names) == 3
    for name in (Path("summary.json"), *names):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--model", "adp_convnt_3"), "did you mean 'adp_convnet_3'"),
        (("--vote", "votes"), "did you mean 'voting'"),
        (("--dataset", "digit"), "did you mean 'digits'"),
        (("--attacks", "mora,autoatack"), "did you mean 'autoattack'"),
        (("--eps", "0"), "eps must be a finite number above 0"),
        (("--eps", "nan"), "eps must be a finite number above 0"),
        (("--n", "0"), "n must be at least 1"),
        (("--n", "598"), "has 597 images"),
        (("--batch-size", "0"), "batch_size must be at least 1"),
        (("--norm", "l2"), "did you mean 'L2'"),
        (("--attacks", ","), "attacks is empty"),
        (("--device", "cuda:99"), "cannot be used here"),
        (("--device", "gpu"), "cannot be used here"),
    ],
)
def test_bad_arguments_stop_before_any_work(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    result = invoke(*EVALUATE, "--out", tmp_path / "run", *change)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "run").exists()


def test_missing_cifar10_says_what_to_do(tmp_path: Path) -> None:
    x = tmp_path / "nowhere"
    result = invoke("evaluate", "--model", "adp_resnet20_3", "--dataset", "cifar10", "--data-dir", x, "--eps", "0.01")
    assert result.exit_code == 2
    assert "--data-dir DIR" in result.output.replace("\n", " ")
    assert "--download" in result.output


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    result = invoke(*EVALUATE, "--attacks", "ea-apgd-ce", "--out", tmp_path)
    assert result.exit_code == 2
    assert "choose another folder" in result.output
    assert (tmp_path / "summary.json").read_text() == "{}"


def test_a_model_without_members_is_refused_before_the_first_attack(digits: tuple[Tensor, Tensor]) -> None:
    single = load_model("standard_convnet_3", dataset="digits").members[0]
    reported: list[str] = []
    with pytest.raises(NotAnEnsembleError, match="as_ensemble"):
        evaluate(single, *digits, ["ea-apgd-ce", "mora"], Settings(eps=0.1), report=lambda name, row: reported.append(name))
    assert not reported


def test_an_attack_that_leaves_the_ball_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, digits: tuple[Tensor, Tensor]
) -> None:
    cheat = lambda model, x, y, settings: Crafted(1 - x)  # noqa: E731
    monkeypatch.setitem(suite.PIPELINES, "eot-square", cheat)
    model = load_model("adp_convnet_3", dataset="digits")
    with pytest.raises(OutOfBallError):
        evaluate(model, *digits, ["eot-square"], Settings(eps=0.1))


def test_images_of_others_that_leave_the_ball_are_told(
    digits: tuple[Tensor, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    x, y = digits[0][:4], digits[1][:4]
    model = load_model("adp_convnet_3", dataset="digits")
    name = "torchattacks:FGSM?eps=8/25"
    row = evaluate(model, x, y, [name], Settings(eps=0.1))["attacks"][name]
    assert row["outside"] == 4
    assert "4 of the 4 images that FGSM returned are outside the Linf ball of eps = 0.1" in caplog.text


def test_images_that_fool_only_the_twin_are_crafted_again_on_the_model(
    monkeypatch: pytest.MonkeyPatch, digits: tuple[Tensor, Tensor]
) -> None:
    """A twin that is far too easy to fool: without a second try, its images would fool nobody."""
    model = load_model("standard_convnet_3", dataset="digits")
    brittle = load_model("standard_convnet_3", dataset="digits")
    for member in brittle.members:
        member.linear2.bias.data[0] += 10
    monkeypatch.setattr(runner, "twin_for", lambda model, x, amp: brittle)
    through_twin = evaluate(model, *digits, ["ea-apgd-ce"], Settings(eps=0.2))
    monkeypatch.undo()
    direct = evaluate(model, *digits, ["ea-apgd-ce"], Settings(eps=0.2))
    assert through_twin["worst_case"]["robust"] <= direct["worst_case"]["robust"] + 10
    assert direct["worst_case"]["robust"] < 30


def test_prepare_folds_batch_norm_and_leaves_the_model_alone() -> None:
    model = make_zoo_ensemble("resnet20", 2).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_(std=0.1)
    x = torch.rand(4, 3, 32, 32)
    expected = model(x)
    twin = prepare(model, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in twin.modules())
    torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(x), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert prepare(model.train(), x) is model
    assert not any(parameter.requires_grad for parameter in twin.parameters())


@pytest.mark.parametrize("vote", slow_but(["voting"], VOTES))
def test_mixed_precision_leaves_no_more_robust(
    vote: str, digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "twin_for", lambda model, x, amp: prepare(model, x[:8], amp=amp))  # also where it is slower
    model = load_model("gal_convnet_3", dataset="digits", vote=vote)
    x, y = digits[0][:60], digits[1][:60]
    twin: Any = prepare(model, x[:8], amp=True)
    scores = twin.member_logits(x)
    assert scores.dtype == x.dtype
    assert not torch.equal(scores, model.member_logits(x))
    torch.testing.assert_close(scores, model.member_logits(x), rtol=0.05, atol=0.1)
    mixed, single = (evaluate(model, x, y, ["mora?steps=20"], Settings(eps=0.12, amp=amp)) for amp in (True, False))
    assert mixed["worst_case"]["robust"] <= single["worst_case"]["robust"] + 1


class SlightNoise(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.01 * torch.randn(1, 3, 8, 8))


class ReadsItsWeight(nn.Module):
    """Cannot run in mixed precision."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.conv(x)).flatten(1)[:, None] * self.fc.weight).sum(2).logcumsumexp(1)


def test_mixed_precision_is_no_laxer_with_what_tracing_would_change() -> None:
    x = torch.rand(4, 3, 8, 8)
    noisy = SlightNoise(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    assert prepare(noisy, x, amp=True) is noisy
    odd = ReadsItsWeight().eval()
    twin = prepare(odd, x, amp=True)
    torch.testing.assert_close(twin(x), odd(x), rtol=0.05, atol=0.05)


def test_prepare_keeps_the_parts_that_attacks_ask_for_and_the_draws() -> None:
    members = [FRONT_ENDED["frontend-resnet20"](depth=3, width=4).eval() for _ in range(2)]
    model = RandomizedEnsemble(members, seed=0).eval()
    x = torch.rand(6, 3, 32, 32)
    twin: Any = prepare(model, x)
    assert twin is not model
    assert not any(isinstance(module, nn.BatchNorm2d) for module in twin.modules())
    assert [name for name, _ in find_parts(twin, "frontend")] == ["members.0.frontend", "members.1.frontend"]
    with model.frozen_noise(), twin.frozen_noise():
        torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-4)


class Reseeds(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return super().forward(x + 0.5 * torch.randn_like(x))


class DrawsConstants(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.5 * torch.rand(1))


@pytest.mark.parametrize("kind", [Reseeds, DrawsConstants])
def test_a_model_that_tracing_would_change_is_not_prepared(kind: type[nn.Module]) -> None:
    model = kind(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    assert prepare(model, torch.rand(4, 3, 8, 8)) is model


class Views(nn.Module):
    """Calls view behind a convolution, which channels_last does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).view(len(x), -1))


class FiveDimensions(Views):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 1, 2, 2, 1))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("make", [Views, FiveDimensions, lambda: torch.jit.script(Views().eval())])
def test_models_that_a_layout_or_freezing_does_not_suit_are_attacked_all_the_same(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    x = torch.rand(6, 3, 8, 8)
    y = model(x).argmax(1)
    twin = prepare(model, x)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-4)
    assert evaluate(model, x, y, ["ea-apgd-ce?steps=10"], Settings(eps=1e-6))["worst_case"]["robust"] == 6
    adversary = AutoAttack(model, eps=1e-6, seed=0, verbose=False, attacks_to_run=["ea-apgd-ce?steps=10"])
    images = adversary.run_standard_evaluation(x, y)
    assert isinstance(images, Tensor)
    assert images.shape == x.shape


def test_a_random_model_is_not_left_to_one_lucky_draw_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    model = load_model("multiresolution_convnet_1", dataset="digits")
    x, y = load_dataset("digits", n=4)
    evaluate(model, x, y, ["torchattacks:FGSM"], Settings(eps=0.1, draws=2, eot_iter=2))
    assert "lucky draw" not in caplog.text
    evaluate(model, x, y, ["torchattacks:FGSM"], Settings(eps=0.1, draws=2))
    assert "draws is 2 and eot_iter None: one lucky draw decides" in caplog.text


def test_a_trace_is_of_the_whole_attack(digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits[0][:6], digits[1][:6]
    model = load_model("frontend_convnet_3", dataset="digits")
    traced: dict[str, Any] = {}
    keep = lambda name, attacked: traced.update({name: attacked.trace[0]})  # noqa: E731
    evaluate(model, x, y, ["bpda", "crossmax-transfer"], Settings(eps=0.12), keep=keep)
    assert {name: row["stage"] for name, row in traced.items()} == {"bpda": -1, "crossmax-transfer": 0}


def test_passes_are_counted_for_anybodys_attack() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    seen: list[int] = []
    counted = count_passes(model, seen.append)
    x = torch.rand(5, 1, 2, 2, requires_grad=True)
    scores = counted(x)
    for k in range(3):
        torch.autograd.grad(scores[:, k].sum(), x, retain_graph=True)
    with torch.no_grad():
        counted(x[:2])
    assert (counted.forwards, counted.backwards) == (7, 15)
    assert sum(seen) == 22


def test_models_doctor_and_version() -> None:
    assert "digits\tadp_convnet_3" in invoke("models").output
    assert "AutoAttack" in invoke("doctor").output
    assert "0.1.0" in invoke("--version").output


def test_importing_the_package_is_light() -> None:
    heavy = "robustbench timm sklearn matplotlib torchvision"
    code = f"import sys, ensemble_attacks; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
