"""What is prepared for a GPU: its jobs can be run, are run once, and go on."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks import gpu
from benchmarks.gpu import ALL, STAGES, Chain, Place, Records, Script, Training
from defenses.architectures import ARCHITECTURES, MIXED
from defenses.multiresolution import SELF_ENSEMBLES
from defenses.recipes import RECIPES
from ensemble_attacks.cli import main as command_line


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # of importing timm
@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("stage", ALL)
def test_every_job_has_a_command_that_can_be_run(stage: str, dry: bool, tmp_path: Path) -> None:
    place = Place(tmp_path, str(tmp_path), "cpu", dry)
    for job in (job for jobs in ALL[stage] for job in jobs):
        command = job.command(place)
        assert command[0] == sys.executable
        if isinstance(job, Training):
            assert job.recipe in RECIPES
            assert {job.network, RECIPES[job.recipe].prefix + job.network} & {*ARCHITECTURES, *MIXED, *SELF_ENSEMBLES}
            continue
        assert isinstance(job, Script)
        of_package = job.file == "evaluate"
        module = command_line if of_package else importlib.import_module(f"benchmarks.{Path(job.file).stem}").main
        known = module.get_command(click.Context(module), "evaluate") if of_package else module
        assert known is not None
        known.make_context(job.file, command[4:] if of_package else command[2:])  # raises on options that are not there


@dataclass(frozen=True)
class Call:
    """A job that runs some Python."""

    code: str
    waiting: bool = False

    def waits(self, place: Place) -> bool:
        return self.waiting

    def command(self, place: Place) -> list[str]:
        return [sys.executable, "-S", "-c", self.code, "--out", str(place.out / "tables")]


def finished(chain: Chain) -> Chain:
    while chain.running is not None or chain.turn():
        if chain.running is not None:
            chain.running.wait()
        chain.turn()
    return chain


def test_a_job_is_run_once_and_a_chain_ends_at_a_failure(tmp_path: Path) -> None:
    place = Place(tmp_path, "data", "cpu", dry=True)
    (tmp_path / "logs").mkdir()
    (tmp_path / "tables").mkdir()
    ran = f"open({str(tmp_path / 'ran')!r}, 'a').write('x'); open({str(tmp_path / 'tables' / 'one.json')!r}, 'w')"
    jobs = [Call(ran), Call("raise SystemExit(3)"), Call("never")]
    for attempt in range(2):
        chain = finished(Chain("some", jobs, place, Records(place)))  # type: ignore[arg-type]
        assert chain.jobs == jobs[1:], attempt
        assert (tmp_path / "ran").read_text() == "x"
    rows = json.loads((tmp_path / "records.json").read_text()).values()
    assert [row["outcome"] for row in rows] == ["done", "failed"]
    assert all(row["tables"] == ["tables/one.json"] and row["device"] == "cpu" for row in rows)


def test_chains_share_no_job(tmp_path: Path) -> None:
    place = Place(tmp_path, "data", "cpu", dry=True)
    records, jobs = Records(place), [Call("one"), Call("two"), Call("one")]
    chains = [Chain("some", part, place, records) for part in (jobs, jobs, [*jobs, Call("three")])]  # type: ignore[arg-type]
    assert [chain.jobs for chain in chains] == [jobs[:2], [], [Call("three")]]


def test_what_is_stopped_goes_on(tmp_path: Path) -> None:
    place = Place(tmp_path, "data", "cpu", dry=True)
    (tmp_path / "logs").mkdir()
    chain = Chain("some", [Call("import time; time.sleep(60)")], place, Records(place))  # type: ignore[list-item]
    assert chain.turn()
    chain.stop()
    (row,) = json.loads((tmp_path / "records.json").read_text()).values()
    assert row["outcome"] == "stopped"
    assert Chain("some", chain.jobs, place, Records(place)).jobs == chain.jobs


def test_an_unknown_stage_is_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(gpu.main, ["run", "sped", "--dry", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "choose from check, speed" in result.output


@pytest.mark.slow
def test_all_stages_run_dry(tmp_path: Path) -> None:
    command = ["run", "--dry", "--out", str(tmp_path), "--minutes", "30"]
    result = CliRunner().invoke(gpu.main, command)
    assert "all done" in result.output, result.output
    rows = json.loads((tmp_path / "records.json").read_text()).values()
    assert {row["stage"] for row in rows} == {*STAGES}
    assert {row["outcome"] for row in rows} == {"done"}
    assert CliRunner().invoke(gpu.main, command).output == "all done\n"
