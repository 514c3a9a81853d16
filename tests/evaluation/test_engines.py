"""Engines of others over the same ledger: Ray and, through submitit, Slurm."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ensemble_attacks import LedgerError
from ensemble_attacks.evaluation import engines
from ensemble_attacks.evaluation.audit import progress
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.units import chains_of
from tests.evaluation.test_ledger import ledger_in, manifest, summary
from tests.helpers import slow_but

pytestmark = pytest.mark.filterwarnings("ignore")  # of what ray and submitit import


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("local") / "run"
    run(ledger_in(folder))
    return summary(folder)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the processes of others."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]) + os.pathsep + os.environ.get("PYTHONPATH", ""))


@pytest.mark.slow
def test_ray_gives_the_same(expected: bytes, tmp_path: Path, importable: None) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ensemble-attacks[ray]'")
    run(ledger_in(tmp_path / "run"), engine="ray", cpus=0.5)
    assert summary(tmp_path / "run") == expected


@pytest.mark.slow
def test_a_ray_node_is_lost(tmp_path: Path, importable: None) -> None:
    """Two nodes, one of which is killed in mid-run: everything is done, and nothing twice in the summary."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ensemble-attacks[ray]'")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    names = ("warm", "undisturbed", "run")
    warm, undisturbed, ledger = (ledger_in(tmp_path / name, n=60, shard_size=6) for name in names)

    def timed(one: Ledger) -> float:
        began = time.perf_counter()
        run(one, engine="ray")
        return time.perf_counter() - began

    def lose_one() -> None:
        while progress(ledger)["done"] < 6:
            time.sleep(0.1)
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=lose_one, daemon=True)
    try:
        timed(warm)  # the first starts the workers
        whole = timed(undisturbed)
        killer.start()
        print(f"two nodes: {whole:.1f} s; one of them lost: {timed(ledger):.1f} s")  # noqa: T201
        killer.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert summary(ledger.folder) == summary(undisturbed.folder)
    assert len(list((ledger.folder / "units").glob("*.json"))) == sum(map(len, chains_of(ledger.manifest)))


@pytest.mark.parametrize("cluster", slow_but(["debug"], ["debug", "local"]))
def test_submitit_gives_the_same(cluster: str, expected: bytes, tmp_path: Path, importable: None) -> None:
    """As jobs in this process, or in processes of their own."""
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'ensemble-attacks[slurm]'")
    run(ledger_in(tmp_path / "run"), engine="slurm", cluster=cluster, minutes=5)
    assert summary(tmp_path / "run") == expected


REFUSED = r"the run began with code 0.0.1\+0, this is .*: install that, or begin anew"


def test_a_task_of_other_code_says_that_it_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run", manifest() | {"code": "0.0.1+0"})
    assert re.fullmatch(REFUSED, engines.refusal(str(ledger.folder), 0, "cpu") or "")
    assert ledger.failed() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "options"),
    [("local", {"workers": 2}), ("ray", {"cpus": 0.5}), ("slurm", {"cluster": "local", "minutes": 5})],
)
def test_a_run_of_other_code_is_refused_not_given_up(
    engine: str, options: dict[str, Any], tmp_path: Path, importable: None
) -> None:
    pytest.importorskip({"ray": "ray", "slurm": "submitit"}.get(engine, "torch"), reason="the engine is not installed")
    ledger = Ledger(tmp_path / "run", manifest() | {"code": "0.0.1+0"})
    with pytest.raises(LedgerError, match=REFUSED):
        run(ledger, engine=engine, **options)
    assert ledger.failed() == []


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_engine_that_is_not_installed(engine: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'ensemble-attacks\[{engine}\]'"):
        engines.ENGINES[engine](Ledger(tmp_path / "run", {"sweep": {}}), [0], print)
