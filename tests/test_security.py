"""What others send is data, and stays data."""

from __future__ import annotations

import ast
import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from defenses import convert, load_model
from ensemble_attacks import LedgerError, WeightsError
from ensemble_attacks import files as checkpoints
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.files import load_tensors

SOURCES = [
    path for folder in ("ensemble_attacks", "defenses") for path in Path(__file__).parents[1].glob(f"{folder}/**/*.py")
]


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_pickle_and_no_unsafe_load_in_the_sources(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec"):
            raise AssertionError(f"{path}: {ast.unparse(node)}")


def test_a_malicious_checkpoint_is_refused(tmp_path: Path) -> None:
    for name, content in (("old.pth", pickle.dumps(Evil())), ("new.pth", None)):
        path = tmp_path / name
        path.write_bytes(content) if content else torch.save({"conv1.weight": Evil()}, path)
        with pytest.raises(WeightsError, match="holds pickled objects"):
            convert([path], "evil_resnet20_1", model_dir=tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_zip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LARGEST", 1 << 20)
    torch.save(torch.zeros(4), buffer := io.BytesIO())
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(buffer) as good, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as bad:
        for entry in good.infolist():
            bad.writestr(entry.filename, bytes(1 << 22) if "data/0" in entry.filename else good.read(entry))
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="more than the"):
        load_tensors(bomb)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/b", "..", "", "a\x00b"])
def test_a_name_that_leads_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model name"):
        load_model(name, tmp_path)
    torch.save({"conv1.weight": torch.zeros(16, 3, 3, 3)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="name"):
        convert([tmp_path / "weights.pth"], name, model_dir=tmp_path / "models")


@pytest.mark.parametrize("part", ["", "units"])
def test_a_symlinked_run_is_refused(part: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir() if part else None
    (tmp_path / "run" / part if part else tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LedgerError, match="is a symbolic link"):
        Ledger(tmp_path / "run", {"sweep": {}})
    assert not list((tmp_path / "elsewhere").iterdir())
