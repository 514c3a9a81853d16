"""Runs that lose nothing: killed, damaged, sharded, on several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from defenses import load_model
from ensemble_attacks import LedgerError
from ensemble_attacks.attacks.registry import registered
from ensemble_attacks.cli.group import main
from ensemble_attacks.data import Opened
from ensemble_attacks.evaluation import chains, runner
from ensemble_attacks.evaluation import manifest as manifests
from ensemble_attacks.evaluation.audit import progress, verify
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.identity import code_version
from ensemble_attacks.evaluation.ledger import ATTEMPTS, Ledger, difference
from ensemble_attacks.evaluation.ledger import Result as Stored
from ensemble_attacks.evaluation.manifest import manifest_of
from ensemble_attacks.evaluation.settings import Sweep
from ensemble_attacks.evaluation.summary import _until, merged
from ensemble_attacks.evaluation.units import Unit, chains_of
from ensemble_attacks.models import providers
from tests.attacks.test_random_models import Flipping
from tests.helpers import slow_but

APGD = "ea-apgd-ce?steps=20"
SMALL = Sweep(("gal_convnet_3",), (0.12,), (APGD, "torchattacks:FGSM"), n=12, shard_size=6)


def manifest(small: Sweep = SMALL, **changes: Any) -> dict[str, Any]:
    return manifest_of(Sweep(**vars(small) | changes), model_dir=None, data_dir="data")


def ledger_in(folder: Path, **changes: Any) -> Ledger:
    return Ledger(folder, manifest(**changes))


def read(ledger: Ledger, unit: Unit) -> Stored:
    stored = ledger.read(unit)
    assert stored is not None
    return stored


def summary(folder: Path) -> bytes:
    return (folder / "summary.json").read_bytes()


def but_for_passes(cell: dict[str, Any]) -> dict[str, Any]:
    for row in cell["attacks"].values():
        row.pop("forwards_per_image")
        row.pop("backwards_per_image")
    return cell


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(ledger_in(folder))
    return folder


def count_attacks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    ran: list[str] = []
    before = chains.attack

    def counted(*args: Any) -> Any:
        ran.append(args[4])
        return before(*args)

    monkeypatch.setattr(chains, "attack", counted)
    return ran


def test_a_finished_run_returns_at_once(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = summary(finished)
    ran = count_attacks(monkeypatch)
    run(ledger_in(finished))
    assert not ran
    assert summary(finished) == before
    assert progress(Ledger(finished))["done"] == 6
    assert all(finding["differ"] == 0 for finding in verify(Ledger(finished)))


@pytest.mark.parametrize("kind", ["json", "safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_file_is_found_and_computed_again(
    kind: str, damage: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(finished), str(folder)], check=True)
    unit = chains_of(Ledger(folder).manifest)[1][1]
    path = folder / "units" / f"{unit.identity}.{kind}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    damages: dict[str, Callable[[], object]] = {
        "flip": lambda: path.write_bytes(data),
        "truncate": lambda: path.write_bytes(data[:-20]),
        "delete": path.unlink,
    }
    damages[damage]()
    ran = count_attacks(monkeypatch)
    run(ledger_in(folder))
    assert ran == [APGD]
    assert summary(folder) == summary(finished)
    assert bool(Ledger(folder).quarantined()) == (damage != "delete" or kind == "safetensors")


def test_a_damaged_manifest_or_summary(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(finished), str(folder)], check=True)
    (folder / "summary.json").write_text("{")
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("0.12", "0.13"))
    with pytest.raises(LedgerError, match="is damaged: run the command that made it again"):
        Ledger(folder)
    ran = count_attacks(monkeypatch)
    run(ledger_in(folder))
    assert not ran
    assert summary(folder) == summary(finished)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": (0.2,)}, r"sweep\.eps\[0\] = 0.12, not 0.2"),
        ({"n": 18}, r"sweep\.n = 12, not 18"),
        ({"attacks": ("mora", "pgd")}, r"sweep\.attacks\[0\] = 'ea-apgd-ce\?steps=20', not 'mora'"),
        ({"seeds": (1,)}, r"sweep\.seeds\[0\] = 0, not 1"),
    ],
)
def test_another_run_does_not_mix(changes: dict[str, Any], message: str, finished: Path) -> None:
    with pytest.raises(LedgerError, match=f"holds another run, with .*{message}: choose another folder"):
        ledger_in(finished, **changes)


def test_other_weights_or_code_do_not_mix(finished: Path) -> None:
    given = manifest()
    given["weights"]["gal_convnet_3"] = "0"
    with pytest.raises(LedgerError, match=r"weights\.gal_convnet_3"):
        Ledger(finished, given)
    with pytest.raises(LedgerError, match="with code = "):
        Ledger(finished, manifest() | {"code": "another"})
    assert difference({"a": [1, 2]}, {"a": [1, 2]}) == ""


def test_folders_that_are_refused(tmp_path: Path, finished: Path) -> None:
    (tmp_path / "link").symlink_to(finished)
    with pytest.raises(LedgerError, match="is a symbolic link"):
        Ledger(tmp_path / "link")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        Ledger(tmp_path / "nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(LedgerError, match="holds other things"):
        ledger_in(tmp_path / "full")
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match="cannot be written"):
        ledger_in(tmp_path / "file" / "run")


@pytest.mark.parametrize(("batch_size", "shard_size"), [(1, 6), (4, 5)])
def test_batches_and_shards_change_nothing(
    batch_size: int, shard_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, bit for bit; but for the backward passes of a batch that is fooled as a whole, which are not run."""
    load = providers.load_model
    monkeypatch.setattr(providers, "load_model", lambda *args, **kw: load(*args, **kw).double())
    take = Opened.take

    def doubled(opened: Opened, rows: Any) -> tuple[Tensor, Tensor]:
        images, labels = take(opened, rows)
        return images.double(), labels

    monkeypatch.setattr(Opened, "take", doubled)
    attacks = ("mora?steps=20", APGD)
    rows = []
    for index, (batch, shard) in enumerate([(6, 6), (batch_size, shard_size)]):
        ledger = ledger_in(tmp_path / str(index), attacks=attacks, n=6, batch_size=batch, shard_size=shard)
        rows.append(but_for_passes(run(ledger)["cells"][0]))
        flags = [read(ledger, unit).tensors["robust"] for chain in chains_of(ledger.manifest) for unit in chain[1:2]]
        rows[-1]["flags"] = torch.cat(flags).tolist()
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_several_processes_give_the_same(finished: Path, tmp_path: Path) -> None:
    run(ledger_in(tmp_path / "run"), workers=2)
    assert summary(tmp_path / "run") == summary(finished)


def test_what_an_attack_fooled_is_not_attacked_again(tmp_path: Path) -> None:
    attacks = ("torchattacks:FGSM", APGD)
    ledger = ledger_in(tmp_path / "run", attacks=attacks, cascade=True)
    (cell,) = run(ledger)["cells"]
    first, second = (cell["attacks"][name] for name in attacks)
    assert second["attacked"] == first["robust"] < first["attacked"]
    assert second["accuracy"] == cell["worst_case"]["accuracy"]
    apart = run(ledger_in(tmp_path / "apart", attacks=attacks))["cells"][0]
    assert apart["worst_case"]["robust"] == cell["worst_case"]["robust"]


HARMLESS = tuple(f"torchattacks:PGD?eps=0.000{i}&steps=1" for i in range(1, 5))


def test_a_cascade_keeps_no_lucky_draws(tmp_path: Path) -> None:
    """Of a random model, whose draws follow the place in the batch; also where one range has nothing left."""
    small = Sweep(("multiresolution_convnet_1",), (0.1,), HARMLESS, n=24, shard_size=24, draws=4, eot_iter=2)
    ledger = Ledger(tmp_path / "run", manifest(small, cascade=True))
    cells = [run(ledger)["cells"][0], run(Ledger(tmp_path / "apart", manifest(small)))["cells"][0]]
    kept, apart = (cell["worst_case"]["accuracy"] for cell in cells)
    assert kept >= apart >= cells[1]["clean"]["accuracy"] - 0.03
    assert not any(finding["differ"] for finding in verify(ledger))
    one_by_one = manifest(small, cascade=True, attacks=HARMLESS[:1], n=6, shard_size=1)
    assert run(Ledger(tmp_path / "one by one", one_by_one))["cells"][0]["attacks"][HARMLESS[0]]["attacked"] < 6


def test_a_cascade_ends_where_an_attack_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(runner, "_attack", failing)
    arguments = ["evaluate", "--model", "gal_convnet_3", "--eps", "0.12", "--n", "4", "--cascade", "--out", tmp_path / "run"]
    result = invoke(*arguments, "--attacks", "torchattacks:PGD,torchattacks:FGSM")
    assert result.exit_code == 1
    assert "Given up: gal_convnet_3 softmax 0.12 torchattacks:FGSM 0-4" in result.output


def test_stages_of_ranges_that_skipped_some() -> None:
    lists = [["mora", "apgd-ce"], ["mora", "crossmax-transfer", "apgd-ce"], ["mora", "apgd-ce", "apgd-t"]]
    order = merged(lists)
    assert order == ["mora", "crossmax-transfer", "apgd-ce", "apgd-t"]
    rows = [[_until(dict.fromkeys(names), order[: index + 1]) for index in range(4)] for names in lists]
    assert rows[0] == ["mora", "mora", "apgd-ce", "apgd-ce"]
    assert rows[2] == ["mora", "mora", "apgd-ce", "apgd-t"]


def test_other_code_may_verify(finished: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for module in (chains, manifests):
        monkeypatch.setattr(module, "code_version", lambda: "another")
    assert all(finding["differ"] == 0 for finding in verify(Ledger(finished)))
    assert "what is computed now may differ" in caplog.text


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_and_run_again(kills: int, finished: Path, tmp_path: Path) -> None:
    """kill -9 at several instants of a run in a process of its own."""
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "ensemble_attacks",
        "evaluate",
        "--model",
        "gal_convnet_3",
        "--eps",
        "0.12",
        "--n",
        "12",
    ]
    command += ["--shard-size", "6", "--attacks", f"{APGD},torchattacks:FGSM", "--out", str(folder)]
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        units = len(list(folder.glob("units/*.json")))
        while process.poll() is None and len(list(folder.glob("units/*.json"))) == units:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
    run(ledger_in(folder))
    assert summary(folder) == summary(finished)
    assert not Ledger(folder).quarantined()


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]


@pytest.mark.parametrize(("number", "code"), slow_but(SIGNALS[1:2], SIGNALS))
def test_stopped_at_once_by_a_signal(number: int, code: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "ensemble_attacks", "evaluate", "--model", "dverge_at_convnet_3", "--eps", "0.1"]
    process = subprocess.Popen(
        [*command, "--attacks", "autoattack", "--out", str(folder)],
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while not all(list(folder.glob(f"{kind}/*.json")) for kind in ("units", "running")):
        time.sleep(0.05)
    assert len(progress(Ledger(folder))["running"]) == 1
    process.send_signal(number)
    assert process.wait(timeout=60) == code  # the attack alone would take longer, and would be done
    found = progress(Ledger(folder))
    assert found["done"] == 1
    assert not found["running"]
    assert len(found["killed"]) == (number == signal.SIGKILL)


def test_what_fails_three_times_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, tries = runner._attack, []

    def failing(model: Any, twin: Any, x: Tensor, y: Tensor, name: str, settings: Any) -> Any:
        if name == APGD:
            tries.append(name)
            raise RuntimeError("out of luck")
        return before(model, twin, x, y, name, settings)

    monkeypatch.setattr(runner, "_attack", failing)
    arguments = ["evaluate", "--model", "gal_convnet_3", "--eps", "0.12", "--n", "6", "--out", tmp_path / "run"]
    result = invoke(*arguments, "--attacks", f"{APGD},torchattacks:FGSM")
    assert result.exit_code == 1
    assert len(tries) == 3
    assert f"Given up: gal_convnet_3 softmax 0.12 {APGD} 0-6" in result.output
    assert "torchattacks:FGSM" in result.output
    assert "failed 3 times" in invoke("status", tmp_path / "run").output
    assert "out of luck" in invoke("status", tmp_path / "run").output
    monkeypatch.setattr(runner, "_attack", before)
    assert invoke(*arguments, "--attacks", f"{APGD},torchattacks:FGSM").exit_code == 1
    assert invoke("resume", tmp_path / "run").exit_code == 0
    assert invoke("verify", tmp_path / "run").exit_code == 0


def test_out_of_memory_halves_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path) -> None:
    before, sizes = runner._attack, []

    def hungry(model: Any, twin: Any, x: Tensor, y: Tensor, name: str, settings: Any) -> Any:
        sizes.append(settings.batch_size)
        if settings.batch_size > 4:
            raise torch.OutOfMemoryError("out of memory")
        return before(model, twin, x, y, name, settings)

    monkeypatch.setattr(runner, "_attack", hungry)
    run(ledger_in(tmp_path / "run", batch_size=16))
    assert sizes[:3] == [16, 8, 4]
    (cell,), (expected,) = (json.loads(summary(folder))["cells"] for folder in (tmp_path / "run", finished))
    assert but_for_passes(cell) == but_for_passes(expected)


def write_suicidal(folder: Path) -> None:
    """Install another package, whose attack kills the process that runs it."""
    (folder / "suicidal.py").write_text(
        "import os\nfrom torchattacks.attack import Attack\n\n\nclass Suicidal(Attack):\n"
        "    def __init__(self, model):\n        super().__init__('Suicidal', model)\n\n"
        "    def forward(self, images, labels):\n        os._exit(9)\n"
    )
    info = folder / "suicidal-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: suicidal\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[ensemble_attacks.attacks]\nsuicidal = suicidal:Suicidal\n")


def forget_plug_ins() -> None:
    registered.cache_clear()
    code_version.cache_clear()


def test_a_worker_that_dies_takes_only_its_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process finds is what this one does."""
    write_suicidal(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    forget_plug_ins()
    try:
        ledger = ledger_in(tmp_path / "run", attacks=("suicidal", "torchattacks:FGSM"), n=4, shard_size=4)
        for _ in range(ATTEMPTS - 1):
            ledger.fail(chains_of(ledger.manifest)[0][1], "an earlier try")
        run(ledger, workers=2)
    finally:
        forget_plug_ins()
    found = progress(ledger)
    assert found["done"] == 2
    assert "the process died" in found["failed"][0]["error"]
    apart = ledger_in(tmp_path / "apart", attacks=("torchattacks:FGSM",), n=4, shard_size=4)
    run(apart)
    fgsm, other = chains_of(apart.manifest)[0][-1], chains_of(ledger.manifest)[0][-1]
    ours, theirs = read(apart, fgsm).tensors, read(ledger, other).tensors
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_unit_whose_workers_die_three_times_is_given_up(tmp_path: Path) -> None:
    write_suicidal(tmp_path)
    command = [sys.executable, "-m", "ensemble_attacks", "evaluate", "--model", "gal_convnet_3", "--eps", "0.12", "--n", "6"]
    command += ["--attacks", "suicidal,torchattacks:FGSM", "--workers", "2", "--out", str(tmp_path / "run")]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "Given up: gal_convnet_3 softmax 0.12 suicidal 0-6" in result.stdout
    found = progress(Ledger(tmp_path / "run"))
    assert found["done"] == 2
    assert "the process died" in found["failed"][0]["error"]


CONFIG = """
models = ["gal_convnet_3", "adp_convnet_3"]
votes = ["softmax", "voting"]
eps = 0.12
attacks = ["torchattacks:FGSM"]
n = 5
"""


def test_a_sweep_from_a_file(tmp_path: Path) -> None:
    config = tmp_path / "sweep.toml"
    config.write_text(CONFIG)
    result = invoke("sweep", config, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    cells = json.loads(summary(tmp_path / "run"))["cells"]
    assert [(cell["model"], cell["vote"]) for cell in cells] == [
        (model, vote) for model in ("gal_convnet_3", "adp_convnet_3") for vote in ("softmax", "voting")
    ]
    for change, message in (
        (("n = 5", "n = true"), "n holds True, which is no int"),
        (("eps", "epsilon"), "unknown key in"),
        (('votes = ["softmax", "voting"]', 'votes = "vote"'), "unknown vote 'vote'"),
        (("n = 5", "n = "), "is not TOML"),
        (('attacks = ["torchattacks:FGSM"]', ""), "does not say its attacks"),
    ):
        config.write_text(CONFIG.replace(*change))
        result = invoke("sweep", config, "--out", tmp_path / "other")
        assert result.exit_code == 2
        assert message in result.output
        assert not (tmp_path / "other").exists()


def test_unknown_engines_and_options(tmp_path: Path) -> None:
    arguments: list[object] = ["evaluate", "--model", "gal_convnet_3", "--eps", "0.12", "--n", "2"]
    arguments += ["--attacks", "torchattacks:FGSM", "--out", tmp_path / "run"]
    assert "did you mean 'local'" in invoke(*arguments, "--engine", "locl").output
    assert "write KEY=VALUE" in invoke(*arguments, "-O", "minutes").output
    assert "unknown option of the engine 'local' (-O) 'minutes'" in invoke(*arguments, "-O", "minutes=3").output
    assert "workers must be at least 1" in invoke(*arguments, "--workers", "0").output
    assert "seed must be below" in invoke(*arguments, "--seed", 10**22).output
    twice = invoke(*arguments[:-4], "--attacks", "mora,torchattacks:FGSM,mora").output
    assert "attacks holds 'mora' twice" in twice
    assert not (tmp_path / "run").exists()
    on_ray = invoke(*arguments, "--engine", "ray", "-O", "partition=gpu", "--device", "cuda").output
    assert "unknown option of the engine 'ray' (-O) 'partition'" in on_ray


class Wrapped(nn.Module):
    """A model of ours, spoiled."""

    def __init__(self, spoil: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.spoil = load_model("standard_convnet_3", dataset="digits"), spoil

    def forward(self, x: Tensor) -> Any:
        return self.spoil(self.net(x), x)


def reseeding(scores: Tensor, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return scores


def raise_on_one(scores: Tensor, x: Tensor) -> Tensor:
    if len(x) == 1:
        raise RuntimeError("batch norm wants more than one image")
    return scores


HOSTILE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "nan": (lambda: Wrapped(lambda s, x: torch.where(x[:, 0, 0, 2:3] > 0.3, torch.nan, s)), "invalid"),
    "infinite": (lambda: Wrapped(lambda s, x: torch.where(x[:, 0, 0, 2:3] > 0.3, torch.inf, s)), "invalid"),
    "probabilities": (lambda: Wrapped(lambda s, x: s.softmax(1)), "worst case"),
    "tuple": (lambda: Wrapped(lambda s, x: (s, x)), "returns a tuple"),
    "wrong shape": (lambda: Wrapped(lambda s, x: s.mean(1)), r"returns scores of shape \(2,\)"),
    "half": (lambda: Wrapped(lambda s, x: s.half()), "worst case"),
    "reseeds": (lambda: Wrapped(reseeding), "worst case"),
    "raises on one": (lambda: Wrapped(raise_on_one), "worst case|wants more than one image"),
    "too few classes": (lambda: Flipping(), "but the model scores 3 classes"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_models(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each either works or gives one clear message."""
    import re

    make, expected = HOSTILE[kind]
    monkeypatch.setattr(providers, "load_model", lambda *args, **kw: make().eval())
    arguments = [
        "evaluate",
        "--model",
        "hostile",
        "--data",
        "digits",
        "--eps",
        "0.12",
        "--n",
        "6",
        "--out",
        tmp_path / "run",
    ]
    result = invoke(*arguments, "--attacks", f"{APGD},torchattacks:FGSM")
    assert re.search(expected, result.output), result.output
    assert result.exit_code in (0, 1, 2)
    assert "Traceback" not in result.output
