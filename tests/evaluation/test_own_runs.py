"""A user's own model and data in every instrument: evaluate, resume, diagnose, verify, report, export; and from Python."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ensemble_attacks import Ensemble, LedgerError, evaluate, verify
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.models.providers import load_model
from tests.evaluation.own import a_batch, write_folder
from tests.evaluation.test_runner import invoke

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what matplotlib imports
X, Y = a_batch()
ATTACKS = ("--attacks", "mora,ea-apgd-ce", "--eps", "0.3", "--batch-size", "5")  # at which images are fooled soon


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user's own, which is the working directory."""
    monkeypatch.chdir(write_folder(tmp_path / "theirs"))
    return Path.cwd()


def units_in(run: Path) -> list[Path]:
    return list((run / "units").glob("*.json"))


def test_every_instrument_takes_a_file_and_its_function(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    run = tmp_path / "run"
    done = invoke("evaluate", "--model", "nets.py:make", "--data", "images.npz", *ATTACKS, "--shard-size", 6, "--out", run)
    assert done.exit_code == 0, done.output
    assert "nets.py:make, voting, images.npz" in done.output
    manifest = Ledger(run).manifest
    assert set(manifest["origins"]["nets.py:make"]["files"]) == {"nets.py", "widths.py"}
    monkeypatch.chdir(tmp_path)  # the names are the folder's, wherever one stands
    for arguments, said in [
        (("status", run), "6"),
        (("resume", run), "worst case"),
        (("verify", run), "0 differ"),
        (("report", run), "report.html"),
        (("export", "robustbench", run, "--out", tmp_path / "bundle", "--partial"), "Adversarial images"),
        (("verify", tmp_path / "bundle", "--model", folder / "nets.py:make", "--data", folder / "images.npz"), "robust"),
    ]:
        result = invoke(*arguments)
        assert result.exit_code == 0, (arguments, result.output)
        assert said in result.output.replace("\n", " ")
    assert "nets.py:make on 10 images of images.npz" in (run / "report" / "report.html").read_text()


def test_a_folder_that_was_moved_is_named_anew(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ("evaluate", "--model", "nets.py:make", "--data", "nets.py:images", *ATTACKS, "--out", run)
    assert invoke(*arguments).exit_code == 0
    moved = tmp_path / "moved"
    folder.rename(moved)
    os.chdir(tmp_path)
    lost = invoke("verify", run)
    assert lost.exit_code == 2
    assert "there is no file" in lost.output
    there = ("--model", moved / "nets.py:make", "--data", moved / "images.npz")
    for command in ("verify", "resume"):
        found = invoke(command, run, *there)
        assert found.exit_code == 0, found.output
    assert invoke("verify", run).exit_code == 0  # resume has noted where they are


def test_a_source_that_has_changed_is_refused_with_what_differs(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ("evaluate", "--model", "nets.py:make", "--data", "images.npz", *ATTACKS, "--out", run)
    assert invoke(*arguments).exit_code == 0
    (folder / "widths.py").write_text("WIDTH = 4 + 1\n")  # the same network by another text
    for command in ("report", "verify", "resume"):
        if command == "resume":
            units_in(run)[0].unlink()  # so that there is something to do
        refused = invoke(command, run)
        assert refused.exit_code == 2, refused.output
        assert "the files of nets.py:make are not those that the run began with: widths.py = " in refused.output
    again = invoke(*arguments)
    assert again.exit_code == 2
    assert "origins.nets.py:make.files.widths.py" in again.output
    (folder / "widths.py").write_text("WIDTH = 5\n")
    np.savez(folder / "images.npz", images=1 - X.numpy(), labels=Y.numpy())
    refused = invoke("verify", run)
    assert refused.exit_code == 2
    assert "images.npz is not what the run began with" in refused.output.replace("\n", " ")


@pytest.mark.slow
def test_a_killed_run_goes_on_with_two_workers_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    """kill -9 in the middle; what two processes add is what one would have found."""
    shared = ("evaluate", "--model", "nets.py:make", "--data", "images.npz", *ATTACKS, "--shard-size", "2")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert invoke(*shared, "--out", whole).exit_code == 0
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ensemble_attacks", *shared, "--out", str(run)]
    process = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run / "units").is_dir() or not units_in(run):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.chdir(tmp_path)
    resumed = invoke("resume", run, "--workers", 2)
    assert resumed.exit_code == 0, resumed.output
    assert (run / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()


def test_diagnose_takes_them_too(folder: Path) -> None:
    """The function says which data are its model's."""
    result = invoke("diagnose", "--model", "nets.py:single", "--eps", 0.05, "--first", 2, "--n", 8)
    assert result.exit_code == 0, result.output
    assert "nets.py:single, own, images.npz, Linf 0.05, 8 images" in result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--model", "nets.py:raises"), "raised KeyError: 'no such thing'"),
        (("--model", "nets.py:nothing"), "returns a list"),
        (("--model", "nets.py:gpu"), "map_location='cpu'"),
        (("--data", "other.npz"), "holds no 'images', but x, y"),
        (("--data", "range.npz"), "y holds 3, but the model scores 3 classes (0 to 2)"),
        (("--data", "shape.npz"), "model 'nets.py:make' does not take the (3, 5, 5) images of shape.npz"),
        (("--data", "digits"), "model 'nets.py:make' does not take the (1, 8, 8) images of digits"),
        (("--data", "four"), "four has 4 classes, but the model scores 3 classes"),
        (("--transform", "crop=5"), "resize it first"),
        (("--sample", "11"), "there are 10 images"),
        (("--sample", "4", "--n", "4"), "name one of them"),
        (("--first", "10"), "has 10 images, 0 from number 10 on"),
        (("--vote", "logits"), "has no votes to choose from"),
    ],
)
def test_what_does_not_fit_is_one_line_before_any_work(change: tuple[str, str], message: str, folder: Path) -> None:
    from PIL import Image

    np.savez("other.npz", x=X.numpy(), y=Y.numpy())
    np.savez("range.npz", images=X.numpy(), labels=Y.numpy() + 1)
    np.savez("shape.npz", images=torch.rand(4, 3, 5, 5).numpy(), labels=Y[:4].numpy())
    for name in "abcd":
        Path("four", name).mkdir(parents=True)
    for name in "abc":
        Image.new("RGB", (4, 4)).save(Path("four", name, "one.png"))
    result = invoke("evaluate", "--model", "nets.py:make", "--data", "images.npz", *ATTACKS, "--out", "run", *change)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output
    assert not Path("run").exists()


def test_a_model_without_data_asks_for_them(folder: Path) -> None:
    result = invoke("evaluate", "--model", "nets.py:make", *ATTACKS, "--out", "run")
    assert result.exit_code == 2
    assert "imply no one dataset (nets.py:make: none): name it, as --data cifar10" in result.output.replace("\n", " ")


def test_images_are_chosen(folder: Path, tmp_path: Path) -> None:
    """--sample, --first and --only-correct attack the images that they name, and the run says which."""
    shared = ("evaluate", "--model", "nets.py:make", "--data", "images.npz", "--attacks", "ea-apgd-ce", "--eps", "0.05")
    right = torch.nonzero(load_model("nets.py:make", dataset="images.npz")(X).argmax(1) == Y).flatten().tolist()
    for options, rows in {
        ("--only-correct",): right,
        ("--first", "4", "--n", "3"): [4, 5, 6],
        ("--first", "1", "--sample", "6"): None,
    }.items():
        run = tmp_path / "-".join(options)
        assert invoke(*shared, *options, "--out", run).exit_code == 0
        manifest = Ledger(run).manifest
        if rows is None:
            assert sorted(Y[manifest["rows"]].tolist()) == [0, 0, 1, 1, 2, 2]
            assert min(manifest["rows"]) >= 1
        else:
            assert manifest["rows"] == rows
        (cell,) = json.loads((run / "summary.json").read_text())["cells"]
        assert cell["n"] == len(manifest["rows"])
        assert invoke("verify", run).exit_code == 0
        if options == ("--only-correct",):
            assert cell["clean"]["accuracy"] == 1
        refused = invoke("export", "robustbench", run, "--out", tmp_path / "bundle", "--partial")
        assert "a choice of images" in refused.output


# -- Python


def own_ensemble(vote: str = "voting") -> Ensemble:
    members = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3)) for _ in range(3)]
    for index, member in enumerate(members):
        member[1].load_state_dict(
            {
                "weight": torch.randn(3, 48, generator=torch.Generator().manual_seed(index)) / 7,
                "bias": torch.zeros(3),
            }
        )
    return Ensemble(members, vote=vote)


@pytest.mark.parametrize("form", ["tensors", "arrays", "dataset", "loader", "file"])
def test_evaluate_from_python(form: str, folder: Path, tmp_path: Path) -> None:
    data: Any = {
        "tensors": (X, Y),
        "arrays": (X.numpy(), Y.numpy()),
        "dataset": TensorDataset(X, Y),
        "loader": DataLoader(TensorDataset(X, Y), batch_size=3),
        "file": "images.npz",
    }[form]
    model = own_ensemble().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = evaluate(model, data, eps=0.3, attacks=["mora"], out=tmp_path / "run", n=8)
    assert [row["attack"] for row in found.rows] == ["clean", "mora", "worst case"]
    assert "voting" in str(found) == found.table
    assert list(found.to_pandas()["attack"]) == ["clean", "mora", "worst case"]
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [row["differ"] for row in found.verify()] == [0, 0, 0, 0]  # two units, the choice of images, the summary
    assert [row["differ"] for row in verify(found.folder, model=own_ensemble(), data=data)] == [0, 0, 0, 0]
    units = units_in(found.folder)
    stamps = [path.stat().st_mtime_ns for path in units]
    assert evaluate(model, data, eps=0.3, attacks="mora", out=tmp_path / "run", n=8).rows == found.rows
    assert [path.stat().st_mtime_ns for path in units] == stamps  # nothing was computed twice


def test_a_run_of_a_program_is_verified_by_what_a_file_makes(folder: Path, tmp_path: Path) -> None:
    model = load_model("nets.py:make", dataset="images.npz")
    found = evaluate(model, (X, Y), eps=0.3, attacks="mora", out=tmp_path / "run", n=3)  # too few for a diagnosis
    assert set(Ledger(found.folder).manifest["origins"]["Ensemble"]["classes"]) == {"Net"}
    alone = invoke("verify", found.folder)
    assert alone.exit_code == 2
    assert "was given by the Python program that began the run" in alone.output
    there = ("--model", "nets.py:make", "--data", "images.npz")
    for command in ("verify", "report", "resume"):
        result = invoke(command, found.folder, *there)
        assert result.exit_code == 0, result.output
    text = (folder / "nets.py").read_text()
    (folder / "nets.py").write_text(text.replace("return self.body(x)", "return 1.0 * self.body(x)"))
    refused = invoke("verify", found.folder, *there)
    assert refused.exit_code == 2
    assert "the classes of Ensemble are not those that the run began with: Net = " in refused.output
    (folder / "nets.py").write_text(text)
    with pytest.raises(LedgerError, match="the weights of Ensemble are not those"):
        verify(found.folder, model=own_ensemble(), data=(X, Y))
    with pytest.raises(LedgerError, match=r"images in .* is not what the run began with"):
        verify(found.folder, model=model, data=(1 - X, Y))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "nets.py:nothing"}, TypeError, "returns a list"),
        ({"model": 3}, TypeError, r"model must be a torch\.nn\.Module or a function"),
        ({"data": (X, Y + 1)}, ValueError, "y holds 3, but the model scores 3 classes"),
        ({"data": (X[:, :, :3], Y)}, ValueError, r"does not take the \(3, 3, 4\) images"),
        ({"data": X}, TypeError, r"expected a pair \(images, labels\)"),
        ({"workers": 2}, ValueError, "name a function that makes it"),
        ({"epsilon": 3}, ValueError, "unknown key in evaluate 'epsilon': did you mean 'eps'"),
        ({"attacks": "moral"}, ValueError, "did you mean 'mora'"),
        ({"eps": 0}, ValueError, "eps must be a finite number above 0"),
        ({"data": (5 * X, Y)}, ValueError, r"expected values in \[0, 1\]"),
    ],
)
def test_bad_arguments_from_python(change: dict[str, Any], error: type[Exception], message: str, folder: Path) -> None:
    arguments: dict[str, Any] = {"model": own_ensemble(), "data": (X, Y), "eps": 0.05, "attacks": "mora", "out": "run"}
    with pytest.raises(error, match=message):
        evaluate(**(arguments | change))
    assert not Path("run").exists()


def test_a_folder_of_another_run_is_refused(folder: Path) -> None:
    evaluate(own_ensemble(), (X, Y), eps=0.05, attacks="ea-apgd-ce", out="run")
    with pytest.raises(LedgerError, match=r"holds another run, with sweep\.eps"):
        evaluate(own_ensemble(), (X, Y), eps=0.06, attacks="ea-apgd-ce", out="run")


def test_doubles_stay_doubles(folder: Path) -> None:
    found = evaluate(own_ensemble().double(), (X.double(), Y), eps=0.05, attacks="ea-apgd-ce", out="run")
    stored: Tensor = next(iter(_images(found.folder)))
    assert stored.dtype == torch.float64


def _images(run: Path) -> list[Tensor]:
    from safetensors.torch import load_file

    return [load_file(path)["x_adv"] for path in (run / "units").glob("*.safetensors")]
