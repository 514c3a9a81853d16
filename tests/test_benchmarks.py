"""The benchmarks' machinery: cells that are kept, rows that are summed over shards."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks import reach, table1, votes
from benchmarks.cells import Cell, Run, choose
from ensemble_attacks.models.votes import VOTES

CELL = Cell("standard_convnet_3", "voting", 0.3)  # at which images are fooled soon


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(out=tmp_path, n=250, seed=0, data_dir="data", dataset="digits")


def test_a_cell_is_run_once_and_on_one_set_of_weights(run: Run) -> None:
    run.attack([CELL], ["mora"])
    (shard,) = run.finished(CELL, ["mora"])
    path = shard["mora"] / "summary.json"
    before = path.stat().st_mtime_ns
    run.attack([CELL], ["mora"])
    assert path.stat().st_mtime_ns == before
    row = table1.row_of(CELL, run, ("mora",))
    assert row is not None
    assert row["n"] == 250
    assert row["clean"] == 100 * json.loads(path.read_text())["clean"]["accuracy"]

    both = table1.row_of(CELL, run, ("mora", "autoattack"))
    assert both is not None
    assert both["AutoAttack"] is both["AutoAttack passes"] is None
    assert both["n"] == 250

    path.write_text(json.dumps({**json.loads(path.read_text()), "weights": "others"}))
    with pytest.raises(click.UsageError, match="with another weights"):
        run.attack([CELL], ["mora"])
    with pytest.raises(click.UsageError, match="with another weights"):
        table1.row_of(CELL, run, ("mora",))


def test_bad_cells_and_counts(run: Run) -> None:
    with pytest.raises(click.BadParameter, match="choose from standard_convnet_3:voting"):
        choose("standard_convnet_3:softmax:0.12", [CELL])
    with pytest.raises(click.BadParameter, match="not a multiple of 250"):
        Run(out=run.out, n=300, seed=0, data_dir="data").shards()


def test_passes_until_counts_over_stages() -> None:
    trace: Counter[tuple[int, int, str]] = Counter()
    for stage, step, fooled, passes in ((-1, 0, 1, 10), (0, 0, 4, 18), (0, 1, 2, 10), (1, 0, 3, 6)):
        trace.update({(stage, step, "fooled"): fooled, (stage, step, "forwards"): passes, (stage, step, "backwards"): 0})
    assert reach.passes_until(trace, 10, 5) == 28
    assert reach.passes_until(trace, 10, 3) == 38
    assert reach.passes_until(trace, 10, 0) == 44
    assert reach.passes_until(trace, 11, 0) == float("inf")


def test_what_an_attack_on_a_vote_is_worth_under_others(tmp_path: Path) -> None:
    options = {"models": "gal_convnet_3", "dataset": "digits", "eps": 0.12, "n": 8, "seeds": 2, "attacks": "pgd?steps=3"}
    arguments = [f"--{name}={value}" for name, value in options.items()] + [f"--out={tmp_path}"]
    run = CliRunner().invoke(votes.main, arguments, catch_exceptions=False)
    rows = json.loads((tmp_path / "digits_transfers.json").read_text())
    assert [row["judged on"] for row in rows] == list(VOTES)
    record = json.loads((tmp_path / "digits" / "gal_convnet_3_pgd?steps=3_voting_1.json").read_text())
    assert record["judged"]["voting"] == record["flags"]
    assert all((count > 1) == (flag == "0") for count, flag in zip(record["fooled"], record["flags"], strict=True))
    members = json.loads((tmp_path / "digits_members.json").read_text())
    assert all(sum(row[f"{count} fooled"] for count in range(4)) == pytest.approx(100) for row in members)
    again = CliRunner().invoke(votes.main, [*arguments, "--table-only"], catch_exceptions=False)
    assert again.output == run.output
