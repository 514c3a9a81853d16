"""Whatever lies where weights should lie, the door answers with the model, or with one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from defenses import load_model as load_own
from defenses.zoo.cards import make_ensemble
from ensemble_attacks import WeightsError
from ensemble_attacks.cli.group import main
from ensemble_attacks.files import load_tensors
from ensemble_attacks.hosts.robustbench import ensure
from ensemble_attacks.models import providers
from tests.test_security import Evil

pytestmark = pytest.mark.filterwarnings("ignore")  # of what timm and robustbench import
NAME = "Andriushchenko2020Understanding"  # the smallest of its zoo
FAULTS: dict[str, Callable[[Path], object]] = {
    "page": lambda path: path.write_text("<!DOCTYPE html><html>Quota exceeded</html>"),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("404: Not Found"),
    "json": lambda path: path.write_text('{"error": "quota"}'),
    "pickle": lambda path: path.write_bytes(b"\x80\x02junk"),
    "zip": lambda path: path.write_bytes(b"PK\x03\x04junk"),
    "code": lambda path: torch.save({"last": Evil()}, path),
    "truncated": lambda path: _truncated(path),
    "another": lambda path: torch.save({"last": {"weight": torch.zeros(3)}}, path),
    "keys": lambda path: torch.save({"first": {}}, path),
    "number": lambda path: torch.save(3, path),
    "list": lambda path: torch.save([torch.zeros(3)], path),
}


def _truncated(path: Path) -> None:
    torch.save({"last": {"weight": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.fixture(scope="module", autouse=True)
def small_zoo() -> Iterator[None]:
    """RobustBench's entry, by a network that is quick to build."""
    ensure()
    from robustbench.model_zoo.enums import ThreatModel
    from robustbench.model_zoo.models import cifar_10_models

    patch = pytest.MonkeyPatch()
    patch.setitem(cifar_10_models[ThreatModel.Linf][NAME], "model", lambda: make_ensemble("resnet20", 1))
    yield
    patch.undo()


def where(model_dir: Path) -> Path:
    path = model_dir / "cifar10" / "Linf" / f"{NAME}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_no_weights_of_the_host(fault: str, tmp_path: Path) -> None:
    FAULTS[fault](where(tmp_path))
    for load in (providers.load_model, load_own):
        with pytest.raises(WeightsError) as caught:
            load(f"robustbench:{NAME}", str(tmp_path), "cifar10")
        assert str(where(tmp_path)) in str(caught.value)
        assert "fetch it again" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)
    with pytest.raises(WeightsError, match="fetch it again"):
        providers.load_model(f"ensemble:{NAME}+standard_resnet20_3", str(tmp_path), "cifar10")


@pytest.mark.parametrize("fault", ["page", "empty", "text", "code"])
def test_the_command_exits_with_2(fault: str, tmp_path: Path) -> None:
    FAULTS[fault](where(tmp_path))
    command = ["diagnose", "--model", f"robustbench:{NAME}", "--dataset", "digits", "--eps", "0.1"]
    unknown = CliRunner().invoke(main, [*command, "--model-dir", str(tmp_path)])
    assert (unknown.exit_code, "unknown model" in unknown.output) == (2, True)
    FAULTS[fault](tmp_path / "net.pth")
    command = ["convert", str(tmp_path / "net.pth"), "--name", "net", "--model-dir", str(tmp_path / "models")]
    told = CliRunner().invoke(main, command)
    assert told.exit_code == 2
    assert "net.pth" in told.output


RAISED = [
    RuntimeError("no route to host"),
    OSError("disk full"),
    KeyError("state_dict"),
    EOFError(),
    SystemExit("Cannot retrieve the public link of the file.\nToo many users have viewed it."),
    AttributeError("'NoneType' object has no attribute 'groups'"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    AssertionError(),
    MemoryError(),
    type("FileURLRetrievalError", (Exception,), {})("Failed to retrieve file url:\n\n\tToo many users\n"),
]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_a_downloader_or_a_provider_raises(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gdown
    import timm

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(gdown, "download", fail)
    monkeypatch.setattr(timm, "create_model", fail)
    provider = SimpleNamespace(list_models=lambda *_: ["theirs"], load_model=fail)
    for name in (f"robustbench:{NAME}", "timm:resnet10t", "theirs"):
        if name == "theirs":
            monkeypatch.setattr(providers, "providers", lambda: [provider])
        with pytest.raises(WeightsError) as caught:
            providers.load_model(name, str(tmp_path), "cifar10")
        assert name.split(":")[-1] in str(caught.value)
        assert type(error).__name__ in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_interrupt_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(providers, "providers", lambda: [SimpleNamespace(list_models=lambda *_: ["x"], load_model=stop)])
    with pytest.raises(KeyboardInterrupt):
        providers.load_model("x")


BESIDE = {
    "best": np.float64(91.3),
    "half": np.float16(0.5),
    "epoch": np.int64(3),
    "flag": np.bool_(True),
    "history": np.arange(4.0),
    "args": argparse.Namespace(lr=0.1, momentum=np.float32(0.9)),
}


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numbers_of_numpy_in_a_sound_file(core: str, tmp_path: Path) -> None:
    """Also those that numpy 1 stored, or 2."""
    before = set(torch.serialization.get_safe_globals())
    state = make_ensemble("resnet20", 1).state_dict()
    torch.save({"last": state, **BESIDE}, where(tmp_path), _use_new_zipfile_serialization=False)
    content = where(tmp_path).read_bytes()
    for other in ("core", "_core"):
        content = content.replace(f"cnumpy.{other}.multiarray\n".encode(), f"cnumpy.{core}.multiarray\n".encode())
    where(tmp_path).write_bytes(content)
    found = load_tensors(where(tmp_path))
    assert found["best"] == 91.3
    assert found["history"].tolist() == [0, 1, 2, 3]
    assert found["args"].lr == 0.1
    assert providers.load_model(f"robustbench:{NAME}", str(tmp_path), "cifar10").training is False
    assert set(torch.serialization.get_safe_globals()) == before
    torch.save({"nets": [{key.removeprefix("members.0."): v for key, v in state.items()}], **BESIDE}, tmp_path / "own.pth")
    assert len(load_own("x_resnet20_1", checkpoint=tmp_path / "own.pth").members) == 1


def test_weights_of_ours_that_are_none(tmp_path: Path) -> None:
    import hashlib
    import json

    folder = tmp_path / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    for content in (b"", b"<html>", b"junk" * 99):
        card = {"architecture": "resnet20", "members": 1, "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "net.json").write_text(json.dumps(card))
        (folder / "net.safetensors").write_bytes(content)
        with pytest.raises(WeightsError, match=r"net.safetensors"):
            providers.load_model("net", str(tmp_path), "cifar10")
    changes: tuple[dict[str, object], ...] = (
        {"members": -1},
        {"num_classes": "x"},
        {"normalization": 3},
        {"negative_slope": []},
    )
    for change in changes:
        (folder / "net.json").write_text(json.dumps(card | change))
        with pytest.raises(ValueError, match="net"):
            providers.load_model("net", str(tmp_path), "cifar10")
