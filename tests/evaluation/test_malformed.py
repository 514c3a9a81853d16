"""Folders, bundles, cards and weights of strangers: each is refused in one line, nothing is run, written or waited for.

How long each takes, and how much memory, is measured by ``benchmarks/malformed.py``.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load, save

from defenses import load_model
from defenses.training import trainer
from ensemble_attacks import WeightsError
from ensemble_attacks.cli.group import main
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.external import export_robustbench
from ensemble_attacks.files import read_tensors
from ensemble_attacks.hosts.state import State
from tests.evaluation.malformed import CARD, RAW, bundles, cards, folders, named_files
from tests.evaluation.test_ledger import ledger_in


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(ledger_in(folder, attacks=("torchattacks:FGSM",), n=4, shard_size=4))
    return folder


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def content_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        found[str(path.relative_to(folder))] = (about.st_mode, about.st_size, about.st_mtime_ns)
    return found


def refused(arguments: list[str], folder: Path, codes: tuple[int, ...] = (2,)) -> str:
    """Run a command; return what is wrong with how it ended, empty if nothing is."""
    before, held, began = content_of(folder), megabytes(), time.monotonic()
    result = CliRunner().invoke(main, arguments)
    spent, grown = time.monotonic() - began, megabytes() - held
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"{type(result.exception).__name__}: {result.exception}"
    if result.exit_code not in codes:
        return f"exit code {result.exit_code}: {result.output[-300:]}"
    if result.exit_code == 2 and len(result.output.strip().splitlines()) > 4:  # usage, and one line
        return f"{len(result.output.splitlines())} lines: {result.output[:300]}"
    if spent > 60 or grown > 500:  # 5 seconds where the machine is not shared by many
        return f"{spent:.1f} s, {grown:.0f} MB"
    return "" if content_of(folder) == before else "the folder was written"


HARMLESS = ("failed", "running", "quarantine")  # refused, or passed by


def test_malformed_folders(finished: Path, tmp_path: Path) -> None:
    damages, wrong = folders(finished), {}
    assert len(damages) >= 113
    for name, (path, damage) in damages.items():
        shutil.copytree(finished, folder := tmp_path / "run", symlinks=True)
        damage(folder / path.relative_to(finished))
        for command in ("status", "verify"):
            # what is damaged inside a unit, `status` need not see
            codes = (0, 2) if command == "status" else (0, 1, 2) if name.startswith(HARMLESS) else (1, 2)
            if told := refused([command, str(folder)], tmp_path, codes):
                wrong[f"{name}: {command}"] = told
        shutil.rmtree(folder)
    assert not wrong, [f"{name}: {told}" for name, told in wrong.items()]


@pytest.mark.filterwarnings("ignore")  # torch's, of quantised tensors
def test_malformed_bundles(finished: Path, tmp_path: Path) -> None:
    bundle, damages = export_robustbench(finished, tmp_path / "bundle", partial=True), bundles()
    wrong = {}
    assert len(damages) >= 40
    for name, damage in damages.items():
        shutil.copytree(bundle, folder := tmp_path / "damaged")
        damage(folder)
        if told := refused(["verify", str(folder), "--model", "gal_convnet_3", "--recraft", "0"], tmp_path, (1, 2)):
            wrong[name] = told
        shutil.rmtree(folder)
    assert not wrong, [f"{name}: {told}" for name, told in wrong.items()]


def test_malformed_cards_and_weights(tmp_path: Path) -> None:
    made = cards(tmp_path)
    load_model(CARD, tmp_path, "digits")
    assert len(made) >= 30
    for case in made.values():
        case()
        held = megabytes()
        with pytest.raises((WeightsError, ValueError)) as error:
            load_model(CARD, tmp_path, "digits")
        assert len(str(error.value).splitlines()) <= 3 or "does not fit" in str(error.value)
        assert megabytes() - held < 500


def test_malformed_files_that_a_user_names(tmp_path: Path) -> None:
    wrong = {}
    for name, (make, arguments) in named_files(tmp_path).items():
        make()
        if told := refused(arguments, tmp_path):
            wrong[name] = told
    assert not wrong, [f"{name}: {told}" for name, told in wrong.items()]


def test_malformed_states_of_autoattack(tmp_path: Path) -> None:
    path, images = tmp_path / "state", torch.rand(4, 1, 8, 8)
    nobody = torch.zeros(4, dtype=torch.bool)
    state = State(images, torch.ones(4).double(), torch.zeros(4).long(), nobody, nobody.clone(), {"mora": nobody}, path=path)
    state.save(now=True)
    sound, device = path.read_bytes(), torch.device("cpu")
    assert torch.equal(State.load(path, {}, device).x_adv, images)
    tensors, about = load(sound), read_tensors(path)[1]["state"]
    changes = {
        "x_adv": (images[:3], images.to(torch.int8), torch.zeros(4)),
        "right": (torch.ones(4), torch.ones(3).double(), torch.ones(4, 4).double()),
        "predicted": (torch.zeros(4), torch.zeros(5).long()),
        "pending": (torch.zeros(4), torch.zeros(0, dtype=torch.uint8)),
        "stage mora": (torch.zeros(4), torch.zeros(1, dtype=torch.uint8)),
        "more": (torch.zeros(4),),
    }
    damaged = [save(tensors | {name: tensor}, {"state": about}) for name, others in changes.items() for tensor in others]
    damaged += [save({k: v for k, v in tensors.items() if k != name}, {"state": about}) for name in tensors]
    for key, value in {"identity": [], "current": 1, "flags": [["x"]], "failed": {"x": 1}, "stages": ["other"]}.items():
        damaged.append(save(tensors, {"state": json.dumps(json.loads(about) | {key: value})}))
    damaged += [save(tensors, {"state": text}) for text in ("", "[" * 10**5, "null", "1" * 5000)] + [save(tensors)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="holds no state of this AutoAttack"):
            State.load(path, {}, device)
    for damage in RAW.values():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.write_bytes(sound)
        damage(path)
        with pytest.raises(ValueError, match="holds no state of this AutoAttack"):
            State.load(path, {}, device)


def test_malformed_checkpoints_of_a_training(tmp_path: Path) -> None:
    path, run = tmp_path / "checkpoint.pt", {"recipe": "standard"}
    sound = {
        "run": run,
        "ensemble": {"w": torch.ones(2)},
        "optimizer": {"state": {0: {"m": torch.ones(2)}}, "param_groups": []},
    }
    sound |= {"schedule": {"last_epoch": 1}, "epoch": 1, "seconds": 2.0, "loss": 0.5, "rounds": 1}
    torch.save(sound, path)
    state = trainer._checked(path, run)
    assert state is not None
    assert state["epoch"] == 1
    values = dict.fromkeys(sound, ("x", None, -1)) | {"loss": ("x", None), "rounds": ("x", -1)}
    bad: list[Any] = [sound | {key: value} for key, others in values.items() for value in others]
    bad += [{key: value for key, value in sound.items() if key != name} for name in sound if name != "rounds"]
    tensors = (
        torch.zeros(1).expand(10**9),
        torch.zeros(2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.zeros(2).to(torch.cfloat),
    )
    bad += [sound | {"ensemble": {"w": tensor}} for tensor in tensors]
    bad += [sound | {"optimizer": {"state": {0: {"m": tensor}}}} for tensor in tensors]
    for content in (*bad, [sound], 1):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"checkpoint.pt' (is no checkpoint|cannot be read)"):
            trainer._checked(path, run)
    for damage in RAW.values():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        torch.save(sound, path)
        damage(path)
        with pytest.raises(ValueError, match="cannot be read"):
            trainer._checked(path, run)
