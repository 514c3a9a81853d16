"""A box, a mask, and eps for each feature, wherever a run is described: the command line, TOML, Python, the ledger."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ensemble_attacks import Box, LedgerError, evaluate
from ensemble_attacks.evaluation.leases import sealed
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.manifest import manifest_of, run_identity
from ensemble_attacks.evaluation.settings import Sweep
from ensemble_attacks.evaluation.units import chain_of
from ensemble_attacks.threat import Threat, number
from tests.evaluation.test_runner import invoke

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what matplotlib imports
SCALES = torch.tensor([1.0, 10.0, 200.0, 0.1, 5.0])  # of the columns
ROWS = """
import torch
from torch import nn

from ensemble_attacks import Ensemble

SCALES = torch.tensor([1.0, 10.0, 200.0, 0.1, 5.0])


def net(seed):
    net = nn.Linear(5, 3, bias=False)
    net.weight.data = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) / SCALES
    return net


def make(members=2):
    return Ensemble([net(seed) for seed in range(members)], vote="logits")
"""


def rows() -> tuple[Tensor, Tensor]:
    x = SCALES * (2 * torch.rand(8, 5, generator=torch.Generator().manual_seed(3)) - 1)
    return x, network()(x).argmax(1)


def network() -> nn.Module:
    """The mean of the two members' logits."""
    weights = [torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) / SCALES for seed in range(2)]
    net = nn.Linear(5, 3, bias=False)
    net.weight.data = torch.stack(weights).mean(0)
    return net.eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of somebody's rows, which is the working directory."""
    (home := tmp_path / "theirs").mkdir()
    monkeypatch.chdir(home)
    Path("rows.py").write_text(ROWS)
    x, y = rows()
    np.savez("rows.npz", images=x.numpy(), labels=y.numpy())
    np.savez("box.npz", low=-SCALES.numpy(), high=SCALES.numpy())
    np.save("radii.npy", 0.2 * SCALES.numpy())
    np.save("mask.npy", np.array([1, 0, 1, 1, 1], dtype=bool))
    return home


EVALUATE = ("evaluate", "--model", "rows.py:make", "--data", "rows.npz")
THREAT = ("--eps", "radii.npy", "--box", "box.npz", "--movable", "mask.npy")
CHEAP = ("--attacks", "ea-apgd-ce")


def images_in(run: Path) -> Tensor:
    ledger = Ledger(run)
    result = ledger.read(chain_of(ledger.manifest, 0)[1])
    assert result is not None
    return result.tensors["x_adv"]


def most_reached(x: Tensor, y: Tensor, radii: Tensor) -> Tensor:
    """Whether any point of the ball in the box fools the linear network, (N,)."""
    weight = network().weight.detach()  # type: ignore[operator]
    fooled = []
    for label, row in zip(y.tolist(), x, strict=True):
        slopes = weight - weight[label]
        ends = torch.where(slopes > 0, (row + radii).minimum(SCALES), (row - radii).maximum(-SCALES))
        fooled.append(bool(((slopes * ends).sum(1) > 0).any()))
    return torch.tensor(fooled)


def test_a_run_in_a_box_of_its_own_needs_nothing_but_its_folder(folder: Path, tmp_path: Path) -> None:
    """What is found is a linear model's worst case; the copied run says it again once the files of the box are gone."""
    done = invoke(*EVALUATE, *THREAT, *CHEAP, "--out", "run")
    assert done.exit_code == 0, done.output
    assert "in [-200, 200], feature by feature; eps from 0.02" in done.output.replace("\n", " ")
    x, y = rows()
    radii = 0.2 * SCALES * torch.tensor([1, 0, 1, 1, 1])
    moved = (images_in(Path("run")) - x).abs()
    assert not moved[:, 1].any()
    assert (moved <= radii * (1 + 1e-6)).all()
    (cell,) = json.loads(Path("run/summary.json").read_text())["cells"]
    assert cell["worst_case"]["robust"] == int((~most_reached(x, y, radii)).sum())
    assert 0 < cell["worst_case"]["robust"] < len(x)
    for name in ("box.npz", "radii.npy", "mask.npy"):
        Path(name).unlink()
    copy = shutil.copytree("run", tmp_path / "copy")
    for arguments in (
        ("verify", copy, "--recraft", 1),
        ("resume", copy),
        ("report", copy),
        ("export", "robustbench", copy, "--out", tmp_path / "bundle", "--partial"),
        ("verify", tmp_path / "bundle", "--model", "rows.py:make", "--data", "rows.npz", "--recraft", 0),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 0, (arguments, result.output)
    page = (copy / "report" / "report.md").read_text()
    assert "4 of 5 features may move" in page
    assert "inputs of " in page  # drawn as lines
    assert "in [-200, 200]" in (tmp_path / "bundle" / "evaluation.md").read_text()


def test_a_run_is_known_by_the_content_of_its_files_not_by_their_names(folder: Path) -> None:
    assert invoke(*EVALUATE, *THREAT, *CHEAP, "--out", "run").exit_code == 0
    stamps = [path.stat().st_mtime_ns for path in Path("run/units").iterdir()]
    for old, new in (("radii.npy", "r.npy"), ("box.npz", "b.npz"), ("mask.npy", "m.npy")):
        Path(old).rename(new)
    renamed = ("--eps", "r.npy", "--box", "b.npz", "--movable", "m.npy")
    assert invoke(*EVALUATE, *renamed, *CHEAP, "--out", "run").exit_code == 0
    assert [path.stat().st_mtime_ns for path in Path("run/units").iterdir()] == stamps
    np.save("m.npy", np.array([1, 1, 1, 1, 0], dtype=bool))
    refused = invoke(*EVALUATE, *renamed, *CHEAP, "--out", "run")
    assert refused.exit_code == 2
    assert "holds another run, with threat.mask.data" in refused.output.replace("\n", " ")


def test_a_forged_threat_is_damaged(folder: Path) -> None:
    assert invoke(*EVALUATE, *THREAT, *CHEAP, "--out", "run").exit_code == 0
    manifest = Ledger(Path("run")).manifest
    manifest["threat"]["mask"] = None
    Path("run/manifest.json").write_bytes(sealed(manifest))
    refused = invoke("verify", "run")
    assert refused.exit_code == 2
    assert "not those that their hash says" in refused.output.replace("\n", " ")
    with pytest.raises(LedgerError, match="is damaged"):
        Ledger(Path("run"))


def test_in_the_unit_box_a_run_is_what_it_was() -> None:
    """No key is added to the manifest, a unit's identity, or the summary, however [0, 1] is written."""
    shared = {"models": "gal_convnet_3", "dataset": "digits", "attacks": ["pgd"], "n": 2}
    places: dict[str, Any] = {"model_dir": None, "data_dir": "data"}
    ways: list[dict[str, Any]] = [{"eps": 8 / 255}, {"eps": "8/255", "box": "0,1", "movable": ""}]
    ways += [{"eps": np.float64(8 / 255), "box": Box()}, {"eps": [8 / 255], "box": [0, 1]}]
    manifests = [manifest_of(Sweep.of(shared | way, "this"), **places) for way in ways]
    assert len({run_identity(manifest) for manifest in manifests}) == 1
    assert "threat" not in manifests[0]
    assert not {"box", "movable", "threat"} & set(manifests[0]["sweep"])
    assert not {"within", "threat"} & set(chain_of(json.loads(json.dumps(manifests[0])), 0)[0].content)


def test_bytes_span_the_box(folder: Path, tmp_path: Path) -> None:
    """Pictures, whose bytes are 0 to 255, are -1 to 1 to a model that lives there: what is found is the same."""
    Path("pictures.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self, span):\n        super().__init__()\n        self.span = span\n"
        "        self.head = nn.Linear(12, 2)\n"
        "        self.head.weight.data = torch.linspace(-1, 1, 24).view(2, 12)\n        self.head.bias.data.zero_()\n\n"
        "    def forward(self, x):\n        low, high = self.span\n"
        "        return self.head(((x - low) / (high - low) - 0.5).flatten(1))\n\n\n"
        "def make(low=0, high=1):\n    return Net((low, high))\n"
    )
    pixels = torch.randint(0, 256, (6, 3, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    np.savez("pixels.npz", images=pixels.numpy(), labels=np.arange(6) % 2)
    found = {}
    for low, high in ((0, 1), (-1, 255)):
        run = tmp_path / f"{low}{high}"
        eps = 0.125 * (high - low)
        model = f"pictures.py:make?low={low}&high={high}"
        done = invoke(
            *("evaluate", "--model", model, "--data", "pixels.npz", "--eps", eps, "--box", f"{low},{high}"),
            *("--attacks", "torchattacks:PGD?steps=3&random_start=False&alpha=0.05", "--out", run),
        )
        assert done.exit_code == 0, done.output
        (cell,) = json.loads((run / "summary.json").read_text())["cells"]
        found[low, high] = [cell["clean"]["robust"]] + [row["robust"] for row in cell["attacks"].values()]
    assert len(set(map(tuple, found.values()))) == 1, found
    assert found[0, 1][0] > found[0, 1][-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--box", "1,-1"), "box is [1, -1]: low must be below high"),
        (("--box", "flipped.npz"), "low must be below high"),
        (("--box", "0,inf"), "must be finite"),
        (("--box", "1"), "write the lowest and the highest value, as -1,1"),
        (("--box", "low,high"), "box 'low' is no number"),
        (("--box", "radii.npz"), "box 'radii.npz' holds no 'low', but eps: store both"),
        (("--box", "short.npz"), "box has shape (3,): expected a number, or one for each feature, (5,)"),
        (("--box", "nowhere.npz"), "box: there is no file 'nowhere.npz'"),
        (("--box", "-1,1"), "expected values in [-1, 1]"),
        (("--movable", "nothing.npy"), "movable is False everywhere: nothing may move"),
        (("--movable", "short.npy"), "movable has shape (3,)"),
        (("--movable", "radii.npy"), "movable holds 40: expected truth values"),
        (("--movable", "rows.py"), "expected a number, or a file of arrays (.npy, .npz, .safetensors)"),
        (("--movable", "text.npy"), "cannot be read as npy"),
        (("--eps", "nought.npy"), "eps per feature must be finite, nowhere below 0, and above 0 somewhere"),
        (("--eps", "negative.npy"), "nowhere below 0"),
        (("--eps", "short.npy"), "eps has shape (3,)"),
        (("--eps", "8/0"), "eps '8/0' is no number: write it as 0.03 or 8/255"),
        (("--eps", "wide"), "eps 'wide' is no number"),
        (("--eps", "500"), "eps is 500, but images in [-200, 200], feature by feature, differ by at most 400"),
        (("--attacks", "apgd-ce"), "attack 'apgd-ce': it knows no mask"),
        (("--attacks", "torchattacks:PGD"), "attack 'torchattacks:PGD': it knows no mask"),
        (("--attacks", "auto"), "attack 'auto': it knows no mask"),
    ],
)
def test_bad_threats_are_one_line_before_any_work(change: tuple[str, str], message: str, folder: Path) -> None:
    np.savez("flipped.npz", low=SCALES.numpy(), high=-SCALES.numpy())
    np.savez("short.npz", low=-SCALES[:3].numpy(), high=SCALES[:3].numpy())
    np.savez("radii.npz", eps=SCALES.numpy())
    np.save("short.npy", np.array([1, 0, 1], dtype=bool) if change[0] == "--movable" else np.ones(3))
    np.save("nothing.npy", np.zeros(5, dtype=bool))
    np.save("nought.npy", np.zeros(5))
    np.save("negative.npy", np.array([1.0, 1, 1, -1, 1]))
    Path("text.npy").write_text("no array")
    result = invoke(*EVALUATE, *THREAT, *CHEAP, "--out", "run", *change)
    assert result.exit_code == 2, result.output
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output
    assert not Path("run").exists()


def test_attacks_that_know_one_eps_say_so(folder: Path) -> None:
    np.save("radii.npy", np.arange(1.0, 6))
    shared = (*EVALUATE, "--eps", "radii.npy", "--box", "box.npz")
    refused = invoke(*shared, "--attacks", "fab-t", "--out", "run")
    assert refused.exit_code == 2
    assert "attack 'fab-t': eps is 0.0075 to 20 of the box's width" in refused.output.replace("\n", " ")
    assert not Path("run").exists()


def test_diagnose_in_a_box(folder: Path) -> None:
    """A model is seen from [0, 1]; of a mask, or of eps of several shares, one line says that the checks know none."""
    box = ("--box", "box.npz", "--eps", "radii.npy")
    found = invoke("diagnose", "--model", "rows.py:make", "--data", "rows.npz", "--n", 8, *box, "--json", "found.json")
    assert found.exit_code == 0, found.output
    assert "Linf 40 in [-200, 200], feature by feature" in found.output.replace("\n", " ")
    checks = {check["name"]: check for check in json.loads(Path("found.json").read_text())["checks"]}
    assert checks["clean"]["figure"] == 1
    assert checks["unbounded"]["verdict"] == "ok"
    masked = invoke("diagnose", "--model", "rows.py:make", "--data", "rows.npz", "--n", 8, *box, "--movable", "mask.npy")
    assert masked.exit_code == 2
    assert "the checks know no mask" in masked.output


def test_a_sweep_s_file_and_a_program_say_the_same(folder: Path) -> None:
    Path("sweep.toml").write_text(
        'models = "rows.py:make"\ndataset = "rows.npz"\nattacks = "ea-apgd-ce"\n'
        'eps = ["1/5", 0.1, "radii.npy"]\nbox = "box.npz"\nmovable = "mask.npy"\n'
    )
    assert invoke("sweep", "sweep.toml", "--out", "swept").exit_code == 0
    cells = json.loads(Path("swept/summary.json").read_text())["cells"]
    assert [cell["eps"] for cell in cells] == [0.2, 0.1, pytest.approx(40)]
    assert ["eps from" in cell["within"] for cell in cells] == [False, False, True]
    found = evaluate(
        "rows.py:make",
        "rows.npz",
        eps=0.2 * SCALES,
        box=(-SCALES, SCALES.numpy()),
        movable=[True, False, True, True, True],
        attacks="ea-apgd-ce",
        out="alone",
        batch_size=np.int64(250),
    )
    (cell,) = found.summary["cells"]
    assert cell == cells[2]


DOUBLE = torch.tensor(8 / 255, dtype=torch.double)


@pytest.mark.parametrize("eps", ["8/255", 8 / 255, np.float64(8 / 255), np.array(8 / 255), DOUBLE])
def test_a_radius_is_a_number_however_it_is_written(eps: Any) -> None:
    threat, numbers = Threat.of(eps=[eps])
    assert threat.plain
    assert numbers == (8 / 255,)


@pytest.mark.parametrize("text", ["", "x", "1/0", "8/", "/8", "0x10", "1e9999/1", "1,5", "--1"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no number: write it as 0\.03 or 8/255"):
        number(text)


def test_a_threat_is_stored_to_the_last_bit() -> None:
    torch.manual_seed(0)
    low = torch.randn(2, 3, dtype=torch.double)
    threat, _ = Threat.of((low, low + 1), torch.rand(2, 3) > 0.5, [0.1, torch.rand(2, 3), torch.rand(3).double()])
    again = Threat.restored(json.loads(json.dumps(threat.stored())))
    assert again.digest == threat.digest
    assert again.box == threat.box
    assert all(torch.equal(again.radii[key], radius) for key, radius in threat.radii.items())
    for key, value in (("low", 7.0), ("radii", []), ("mask", {"dtype": "object", "shape": [1], "data": ""})):
        with pytest.raises(ValueError, match=r"hash|an array is|low must be below"):
            Threat.restored({**(threat.stored() or {}), key: value})
    with pytest.raises(ValueError, match="has 3 bytes"):
        Threat.restored({**(threat.stored() or {}), "mask": {"dtype": "bool", "shape": [2], "data": "AQEB"}})
