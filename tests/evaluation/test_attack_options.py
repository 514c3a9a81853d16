"""Attacks that are named with options, ``mora?steps=10``."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from ensemble_attacks import MORA, AutoAttack, Ensemble
from ensemble_attacks.attacks.registry import find_attack, find_maker
from ensemble_attacks.cli.group import main
from ensemble_attacks.evaluation.runner import attack
from ensemble_attacks.evaluation.settings import Settings


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return Ensemble([nn.Sequential(nn.Flatten(), nn.Linear(75, 5)) for _ in range(2)], vote="softmax").eval()


def tiny_ball(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, Settings]:
    x = torch.rand(2, 3, 5, 5)
    return x, model(x).argmax(1), Settings(1e-6)  # in which nothing can be fooled


def test_options_are_the_attack_s_arguments(model: nn.Module) -> None:
    made = find_maker("mora-mt?steps=7&betas=0.5&targets=2")(model, norm="Linf", eps=0.1, seed=3)
    assert isinstance(made, MORA)
    assert (made.steps, made.betas, made.targets, made.seed) == (7, (0.5,), 2, 3)
    assert find_maker("mora-mt")(model).targets == 9


@pytest.mark.parametrize("name", ["bpda", "bpda-mora", "crossmax-transfer", "front-end-reversal"])
def test_options_are_those_of_the_attack_inside_too(model: Any, name: str) -> None:
    model.members.insert(0, nn.Sequential(OrderedDict(frontend=nn.Identity(), net=model.members[0])))
    made = find_maker(f"{name}?steps=7")(model, norm="Linf", eps=0.1, seed=3)
    assert (made.inner.steps, made.inner.seed) == (7, 3)
    with pytest.raises(ValueError, match="option of the attack"):
        find_attack(f"{name}?attack=APGD")


def test_the_attack_inside_is_the_one_that_is_made(model: Any) -> None:
    model.members.insert(0, nn.Sequential(OrderedDict(frontend=nn.Identity(), net=model.members[0])))
    made = find_maker("bpda-mora?betas=0.5&targets=2")(model, norm="Linf", eps=0.1)
    assert (made.inner.betas, made.inner.targets) == ((0.5,), 2)


def test_a_stage_of_an_attack_can_be_left_out(model: Any) -> None:
    assert find_maker("crossmax-transfer?refine=None")(model, norm="Linf", eps=0.1).refine is None


@pytest.mark.parametrize("name", ["mora?stepz=3", "apgd-ce?stepz=3", "auto?stepz=3"])
def test_unknown_options_name_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match=r"stepz.*steps"):
        find_attack(name)


@pytest.mark.parametrize("name", ["mora?eps=0.1", "apgd-ce?seed=1"])
def test_what_the_run_says_is_no_option(name: str) -> None:
    with pytest.raises(ValueError, match="option of the attack"):
        find_attack(name)


def test_bad_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps"):
        find_attack("apgd-ce?steps=0")


@pytest.mark.parametrize("name", ["mora?steps=3&betas=0.5", "apgd-ce?steps=3", "ea-apgd-ce?steps=3"])
def test_steps_are_what_is_spent(model: nn.Module, name: str) -> None:
    x, y, settings = tiny_ball(model)
    done = attack(model, model, x, y, name, settings)
    assert done.backwards / len(x) <= 4


def test_auto_with_steps_is_shorter(model: nn.Module) -> None:
    x, y, settings = tiny_ball(model)
    done = attack(model, model, x, y, "auto?steps=2", settings)
    assert set(done.stages) >= {"mora", "apgd-ce"}
    assert done.forwards / len(x) < 600  # of some 10,000


def test_an_adversary_s_steps_are_kept_by_another_version(model: nn.Module) -> None:
    adversary = AutoAttack(model, eps=1e-6, seed=0, verbose=False, version="ensemble")
    adversary.steps = 2
    adversary.set_version("adaptive")
    x, y, _ = tiny_ball(model)
    adversary.run_standard_evaluation(x, y)
    assert adversary.steps == 2
    assert (adversary.apgd.n_iter, adversary.square.n_queries) == (2, 100)


def test_the_command_line_takes_options(tmp_path: Path) -> None:
    given = "evaluate --model standard_convnet_3 --dataset digits --n 4 --eps 0.05 --attacks mora?steps=2,apgd-ce?steps=2"
    result = CliRunner().invoke(main, [*given.split(), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    names = json.loads((tmp_path / "run" / "summary.json").read_text())["cells"][0]["attacks"]
    assert list(names) == ["mora?steps=2", "apgd-ce?steps=2"]
