"""The command line explains itself: help without torch, completion, a plan, the tables, what runs say of themselves."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from ensemble_attacks.attacks import registry
from ensemble_attacks.attacks.registry import RECORDS, find_maker
from ensemble_attacks.cli import choices, main
from ensemble_attacks.cli.group import COMMANDS
from ensemble_attacks.data import DATASETS
from ensemble_attacks.evaluation.engines import ENGINES
from ensemble_attacks.evaluation.estimate import cost_of
from ensemble_attacks.evaluation.tracking import LOGGERS, MODULES
from ensemble_attacks.models import providers
from ensemble_attacks.models.votes import VOTES
from ensemble_attacks.norms import NORMS
from tests.helpers import make_ensemble

RUN = ("evaluate", "--model", "gal_convnet_3", "--eps", "0.1", "--n", "4", "--attacks", "torchattacks:FGSM,ea-apgd-ce")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def test_help_needs_no_torch() -> None:
    """Neither that of the program nor that of any command, nor completion: each answers at once."""
    code = """
        import sys
        from click.testing import CliRunner
        from ensemble_attacks.cli import choices, main
        for name in ("", *main.list_commands(None)):
            told = CliRunner().invoke(main, [*name.split(), "--help"])
            assert told.exit_code == 0 and "Usage" in told.output, (name, told.output)
        assert choices.shipped("digits") and CliRunner().invoke(main, ["attacks", "--markdown"]).exit_code == 0
        print([heavy for heavy in ("torch", "numpy", "rich", "torchattacks", "matplotlib") if heavy in sys.modules])
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_help_has_a_line_for_each_attack() -> None:
    told = " ".join(invoke("evaluate", "--help").output.split())
    assert all(f"{name} {record.summary[:20]}" in told for name, record in RECORDS.items())
    assert len(COMMANDS) == len(set(COMMANDS))


def test_choices_are_those_of_the_registries() -> None:
    assert set(choices.DATASETS) == set(DATASETS)
    assert set(choices.VOTES) == set(VOTES)
    assert set(choices.NORMS) == set(NORMS)
    assert tuple(ENGINES) == choices.ENGINES
    assert tuple(MODULES) == tuple(LOGGERS) == choices.TRACKERS
    assert choices.shipped() == providers.list_models()
    assert {f"{kind}:" for kind in (*providers._all("KINDS"), *providers._all("COMBINATIONS"))} == set(choices.KINDS)


def test_values_are_completed() -> None:
    ctx = click.Context(click.Command("evaluate"))
    ctx.params["dataset"] = "digits"
    parameter = click.Option(["--x"])
    assert [item.value for item in choices.attacks(ctx, parameter, "autoattack,mora-")] == ["autoattack,mora-mt"]
    assert [item.value for item in choices.models(ctx, parameter, "gal_")] == [
        name for name in choices.shipped("digits") if name.startswith("gal_")
    ]


def test_the_plan_comes_first_and_a_dry_run_is_nothing_but_the_plan(tmp_path: Path) -> None:
    told = invoke(*RUN, "--dry-run", "--threads", "1", "--out", tmp_path / "run")
    assert told.exit_code == 0, told.output
    assert "Plan: 1 model x 1 vote x 1 eps, 4 images, torchattacks:FGSM, ea-apgd-ce; 1 thread of torch" in told.output
    assert f"({cost_of('ea-apgd-ce')} for one that holds out), and those of torchattacks:FGSM" in told.output
    assert not (tmp_path / "run").exists()


def test_a_sweep_ends_with_one_table_and_status_tells_the_results(tmp_path: Path) -> None:
    config = tmp_path / "sweep.toml"
    config.write_text('models = "gal_convnet_3"\neps = [0.05, 0.1]\nattacks = "torchattacks:FGSM"\nn = 4\n')
    told = invoke("sweep", config, "--out", tmp_path / "run")
    assert told.exit_code == 0, told.output
    overview = told.output.partition("robust % of all cells")[2]
    assert overview.count("gal_convnet_3") == 2
    assert "torchattacks:FGSM" in overview
    status = invoke("status", tmp_path / "run").output
    assert "4 of 4 units done" in status
    assert "gal_convnet_3, softmax, Linf 0.05: clean 100.0 (4), torchattacks:FGSM" in status


def test_long_names_are_not_cut(tmp_path: Path) -> None:
    name = "torchattacks:PGD?steps=1&alpha=0.0123456789012345678901234567890123456789012345678901234567890123456789"
    told = invoke(*RUN[:-1], name, "--out", tmp_path / "run")
    assert told.exit_code == 0, told.output
    column = "".join(line.split("│")[1].strip() for line in told.output.splitlines() if line.startswith("│"))
    assert name in column


def test_hosts_are_silent_about_their_settings() -> None:
    CliRunner().invoke(main, ["attacks", "--markdown"])
    assert not logging.getLogger("auto-attack").isEnabledFor(logging.INFO)
    assert logging.getLogger("auto-attack").isEnabledFor(logging.WARNING)


def test_nowhere_is_told() -> None:
    told = invoke("verify", "nowhere")
    assert told.exit_code == 2
    assert "there is no nowhere: name the folder of `evaluate --out`, or a bundle" in " ".join(told.output.split())


def test_a_default_step_as_large_as_the_ball_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make_ensemble()
    settings = {"norm": "Linf", "seed": 0, "batch_size": 4, "eot_iter": None}
    with caplog.at_level(logging.WARNING):
        for name, eps in (
            ("torchattacks:PGD?alpha=0.001", 0.001),
            ("torchattacks:PGD", 0.1),
            *2 * (("torchattacks:PGD", 0.001),),
        ):
            find_maker(name)(model, eps=eps, **settings)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "give them, torchattacks:PGD?alpha=0.00025" in told


def test_attacks_are_made_as_before() -> None:
    """Their modules are imported when they are made, and not before."""
    made = registry.RECORDS["bpda-mora"].make
    assert made is registry._bpda_mora
    assert type(find_maker("cw")(make_ensemble(), norm="L2", eps=0.1, seed=0, batch_size=4)).__name__ == "PGD"
