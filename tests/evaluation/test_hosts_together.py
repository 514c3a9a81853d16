"""Several hosts, and readers, on one folder: nobody removes what is another's, and who only reads writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from ensemble_attacks import LedgerError
from ensemble_attacks.cli.group import main
from ensemble_attacks.evaluation import chains
from ensemble_attacks.evaluation.audit import progress, verify
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.leases import LEASE, sealed
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.summary import run_digest
from ensemble_attacks.evaluation.units import chains_of
from ensemble_attacks.files import machine, whole_file
from tests.evaluation.test_ledger import ledger_in

SMALL = {"attacks": ("torchattacks:FGSM",), "n": 4, "shard_size": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(ledger_in(folder, **SMALL))
    return folder


def mark(folder: Path, kind: str, host: str, pid: int, idle: float = 0) -> Path:
    unit = chains_of(Ledger(folder).manifest)[0][1]
    path = folder / kind / f"x{len(list((folder / kind).iterdir()))}.json"
    content = {"unit": unit.content} if kind == "running" else {}
    path.write_bytes(sealed({**content, "host": host, "machine": host, "pid": pid, "parent": 1, "since": 0.0}))
    os.utime(path, (time.time() - idle,) * 2)
    return path


def test_marks_and_files_of_others_are_left_to_them(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, folder := tmp_path / "run")
    gone = 2**22 + 1  # a pid that no process has
    kept = [mark(folder, "running", "elsewhere", 1), mark(folder, "driving", "elsewhere", gone)]
    kept += [mark(folder, "running", machine(), os.getpid())]
    dead = [mark(folder, "running", machine(), gone), mark(folder, "driving", "elsewhere", 1, idle=LEASE + 1)]
    for host, pid, place in (("elsewhere", gone, kept), (machine(), os.getpid(), kept), (machine(), gone, dead)):
        place.append(folder / "units" / f".x.json.{host}.{pid}.0123456789abcdef.tmp")
        place[-1].write_text("")
    old = folder / ".summary.json.elsewhere.1.0123456789abcdef.tmp"
    old.write_text("")
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    Ledger(folder).forget_dead()
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in (*dead, old))


def test_status_tells_running_stopped_and_killed(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, folder := tmp_path / "run")
    assert progress(Ledger(folder))["state"] == "finished"
    for path in list(folder.glob("units/*"))[:2]:
        path.with_suffix(".json").unlink(missing_ok=True)
    told = CliRunner().invoke(main, ["status", str(folder)]).output.replace("\n", "")
    assert "stopped: resume with `ensemble-attacks resume" in told
    driver = mark(folder, "driving", "elsewhere", 1)
    assert progress(Ledger(folder))["state"] == "running"
    os.utime(driver, (time.time() - LEASE - 1,) * 2)
    assert progress(Ledger(folder))["state"] == "killed"


def test_readers_write_nothing_and_need_no_empty_folders(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, folder := tmp_path / "run")
    for name in ("failed", "running", "driving", "quarantine"):
        (folder / name).rmdir()
    damaged = next(folder.glob("units/*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = {path: path.lstat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
    ledger = Ledger(folder)
    assert progress(ledger)["done"] == 4
    findings = [finding for finding in verify(ledger) if finding["differ"] != 0]
    assert findings[0]["differ"] is None
    assert "checksum mismatch of the tensors" in findings[0]["what"][0]
    assert {path: path.lstat().st_mtime_ns for path in (folder, *folder.rglob("*"))} == before


def test_a_prepared_name_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The victim's file behind a link that waits under the temporary name, were that ever guessed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 2 * n)
    waiting = tmp_path / f".out.json.{machine()}.{os.getpid()}.{'0' * 16}.tmp"
    waiting.symlink_to(victim)
    with pytest.raises(FileExistsError), whole_file(tmp_path / "out.json") as file:
        file.write(b"overwritten")
    assert victim.read_text() == "precious"


def test_the_digest_is_the_same_again_and_holds_everything(finished: Path, tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path / "again", **SMALL)
    run(ledger)
    assert run_digest(ledger) == run_digest(Ledger(finished))
    shutil.copytree(finished, folder := tmp_path / "run")
    path = next(folder.glob("units/*.json"))
    content = json.loads(path.read_text())
    content.pop("sha256")
    path.write_bytes(sealed(content | {"forwards": content["forwards"] + 1}))
    assert run_digest(Ledger(folder)) != run_digest(ledger)


def test_a_models_options_do_not_mix(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card's option, or a plug-in's code, that changed between two ranges."""
    monkeypatch.setattr(chains, "made_of", lambda *arguments: "another")
    for path in list(finished.glob("units/*"))[:1]:
        path.with_suffix(".json").rename(path.with_suffix(".away"))
    with pytest.raises(LedgerError, match="the options or the code of gal_convnet_3 are not those that the run began with"):
        run(Ledger(finished))
    for path in finished.glob("units/*.away"):
        path.rename(path.with_suffix(".json"))
