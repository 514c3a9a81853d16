"""What a checkpoint says of an ensemble is kept, or refused: probabilities, channels, architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner
from torch import Tensor

from defenses import convert, load_model
from defenses.architectures import ARCHITECTURES
from defenses.zoo.checkpoints import architecture_of, translate
from defenses.zoo.convert import ensemble_from_checkpoint
from ensemble_attacks import WeightsError
from ensemble_attacks.cli.group import main
from ensemble_attacks.models.ask import member_probabilities

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def states() -> list[State]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [ARCHITECTURES["resnet20"]().state_dict() for _ in range(2)]


KEPT: dict[str, Callable[[list[State]], Any]] = {
    "tensor": lambda nets: {"nets": nets, "alpha": torch.tensor([0.9, 0.1])},
    "list": lambda nets: {"nets": nets, "prob": [0.9, 0.1]},
    "numpy": lambda nets: {"net": nets, "probabilities": np.array([0.9, 0.1])},
    "two names": lambda nets: {"nets": nets, "alpha": [0.9, 0.1], "prob": [0.9, 0.1]},
    "by member": lambda nets: {"nets": nets, "alpha": {"0": 0.9, "1": 0.1}},
    "within": lambda nets: {"nets": nets, "defense": {"alpha": (0.9, 0.1)}},
    "column": lambda nets: {"nets": nets, "alpha": torch.tensor([[0.9], [0.1]])},
    "beside each": lambda nets: [{"state_dict": net, "alpha": p} for net, p in zip(nets, (0.9, 0.1), strict=True)],
    "training, too": lambda nets: {
        "nets": nets,
        "prob": [0.9, 0.1],
        "acc": [91.0, 92.0],
        "optimizer": {"betas": [0.9, 0.99]},
    },
    "flat": lambda nets: (
        {f"nets.{i}.{k}": v for i in (0, 1) for k, v in nets[i].items()} | {"alpha": torch.tensor([0.9, 0.1])}
    ),
    "flat, each": lambda nets: {
        f"nets.{i}.{k}": v for i in (0, 1) for k, v in (nets[i] | {"prob": torch.tensor([0.9, 0.1][i])}).items()
    },
}


@pytest.mark.parametrize("layout", KEPT)
def test_probabilities_are_kept(layout: str, states: list[State], tmp_path: Path) -> None:
    torch.save(KEPT[layout](states), tmp_path / "net.pth")
    x = torch.rand(2, 3, 32, 32)
    plain, _ = ensemble_from_checkpoint(tmp_path / "net.pth")
    convert(tmp_path / "net.pth", "x_resnet20_2", model_dir=tmp_path)
    for model in (plain, load_model("x_resnet20_2", checkpoint=tmp_path / "net.pth"), load_model("x_resnet20_2", tmp_path)):
        found = member_probabilities(model)
        assert found is not None
        torch.testing.assert_close(found.float(), torch.tensor([0.9, 0.1]))
        torch.testing.assert_close(model.member_logits(x), plain.member_logits(x))


def test_one_number_in_each_of_several_files(states: list[State], tmp_path: Path) -> None:
    for index, state in enumerate(states):
        torch.save({"state_dict": state, "prob": 0.5}, tmp_path / f"{index}.pth")
    model, card = ensemble_from_checkpoint([tmp_path / "0.pth", tmp_path / "1.pth"])
    assert member_probabilities(model) is not None
    assert card["probabilities"] == [0.5, 0.5]


REFUSED: dict[str, dict[str, Any]] = {
    "weights": {"weights": torch.tensor([0.9, 0.1])},
    "of another name": {"w": [0.3, 0.7]},
    "temperatures": {"temperature": np.array([1.0, 2.0])},
    "no probabilities": {"alpha": [2.0, 1.0]},
    "negative": {"prob": [1.5, -0.5]},
    "not a number": {"prob": [float("nan"), 1.0]},
    "three for two": {"alpha": [0.5, 0.25, 0.25]},
    "one for two": {"alpha": 0.9},
    "contradicting": {"alpha": [0.9, 0.1], "prob": [0.5, 0.5]},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_numbers_that_would_be_dropped_are_refused(kind: str, states: list[State], tmp_path: Path) -> None:
    torch.save({"nets": states, **REFUSED[kind]}, tmp_path / "net.pth")
    for load in (
        lambda: load_model("x_resnet20_2", checkpoint=tmp_path / "net.pth"),
        lambda: convert(tmp_path / "net.pth", "net", model_dir=tmp_path / "models"),
    ):
        with pytest.raises(WeightsError, match="save the members' state dicts alone"):
            load()
    assert not (tmp_path / "models").exists()


def test_what_training_leaves_is_passed_by(states: list[State], tmp_path: Path) -> None:
    left = {
        "best_acc": [91.0, 92.0],
        "losses": torch.ones(2),
        "epoch": 3,
        "args": {"alpha": 2 / 255, "w": [1, 2]},
        "note": "x",
    }
    torch.save({"nets": states, **left}, tmp_path / "net.pth")
    assert load_model("x_resnet20_2", checkpoint=tmp_path / "net.pth", vote="voting").vote == "voting"
    torch.save({"state_dict": states[0], "alpha": 0.9, "weights": 1.0}, tmp_path / "one.pth")  # of a single network
    assert load_model("x_resnet20_1", checkpoint=tmp_path / "one.pth").vote == "softmax"


def test_channels_and_classes_are_the_datasets(states: list[State], tmp_path: Path) -> None:
    torch.save(states[0], tmp_path / "net.pth")
    for load in (
        lambda: load_model("x_resnet20_1", checkpoint=tmp_path / "net.pth", dataset="digits"),
        lambda: convert(tmp_path / "net.pth", "net", model_dir=tmp_path / "models", dataset="digits"),
    ):
        with pytest.raises(WeightsError, match="takes images of 3 channels, those of digits have 1"):
            load()
    torch.save(ARCHITECTURES["resnet20"](in_channels=1).state_dict(), tmp_path / "grey.pth")
    with pytest.raises(WeightsError, match="takes images of 1 channels, those of cifar10 have 3"):
        load_model("x_resnet20_1", checkpoint=tmp_path / "grey.pth")
    torch.save([states[0], ARCHITECTURES["resnet20"](in_channels=1).state_dict()], tmp_path / "both.pth")
    with pytest.raises(WeightsError, match="channels"):
        load_model("x_resnet20_2", checkpoint=tmp_path / "both.pth")


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_a_network_of_four_stages_is_called_what_it_is(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        layout = getattr(torchvision.models, name)(num_classes=10).state_dict()
    state = {key: torch.zeros(()).expand(value.shape) for key, value in layout.items()}
    assert architecture_of(translate(state)[0]) == (name, 10)
    torch.save(state, tmp_path / "net.pth")
    for load in (
        lambda: load_model("x_resnet20_1", checkpoint=tmp_path / "net.pth"),
        lambda: convert(tmp_path / "net.pth", "net", model_dir=tmp_path),
    ):
        with pytest.raises(WeightsError, match=f"is a {name}, not one that can be built here"):
            load()


@pytest.mark.parametrize("architecture", ["resnet20", "resnet20b", "resnet56", "resnet110b"])
def test_ours_are_still_told(architecture: str) -> None:
    with torch.device("meta"):
        layout = ARCHITECTURES[architecture]().state_dict()
    assert architecture_of({key: torch.zeros(()).expand(value.shape) for key, value in layout.items()}) == (architecture, 10)


def test_the_command_prints_the_clean_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemble_attacks.cli.models.CLEAN", 20)
    net = ARCHITECTURES["resnet20"](in_channels=1, normalization=([0.5], [0.2]))
    state = {"normalize.mean": torch.tensor([0.5]), "normalize.std": torch.tensor([0.2]), **net.state_dict()}
    torch.save({"nets": [state, state], "prob": [0.5, 0.5]}, tmp_path / "net.pth")
    command = ["convert", str(tmp_path / "net.pth"), "--model-dir", str(tmp_path / "models")]
    told = CliRunner().invoke(main, [*command, "--name", "small", "--dataset", "digits"])
    assert (told.exit_code, "Clean accuracy: " in told.output, "of 20 test images" in told.output) == (0, True, True)
    torch.save([ARCHITECTURES["resnet20"]().state_dict()], tmp_path / "net.pth")
    told = CliRunner().invoke(main, [*command, "--name", "large", "--data-dir", str(tmp_path)])
    assert (told.exit_code, "Clean accuracy unknown" in told.output) == (0, True)
