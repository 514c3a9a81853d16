"""Models of a user's own by name: functions in files and packages, folders, other libraries', and ensembles of these."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from defenses import load_model as load_defense
from defenses.zoo.cards import write_model
from ensemble_attacks import Ensemble, names
from ensemble_attacks.models.providers import functions_in, implied_dataset, load_model
from ensemble_attacks.sources import environment_of, sources_of
from tests.evaluation.own import NETS, write_folder

X = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(write_folder(tmp_path / "theirs"))
    return "nets.py"


def load(name: str) -> Any:
    return load_model(name, dataset="images.npz")


def test_functions_of_files(nets: str) -> None:
    state = torch.get_rng_state()
    model = load(f"{nets}:make?members=2&vote=logits")
    assert (len(model.members), model.vote, model.training) == (2, "logits", False)
    assert model.member_logits(X).shape == (2, 2, 3)
    assert torch.equal(load(f"{nets}:make")(X), load(f"{nets}:make")(X))  # untrained weights, too, are the same
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(load_defense(f"{nets}:make", dataset="digits")(X), load(f"{nets}:make")(X))
    adopted = load(f"{nets}:adopted")
    torch.testing.assert_close(adopted.member_logits(X).sum(0), adopted(X))
    assert [path.name for path in Path().iterdir() if path.name == "__pycache__"] == []


def test_functions_of_packages(nets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path("theirpackage")
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "inner.py").write_text(
        "from . import sizes\nfrom torch import nn\n\n\ndef make():\n    return nn.Linear(*sizes.S)"
    )
    (package / "sizes.py").write_text("S = (3, 4)\n")
    try:
        assert load("theirpackage.inner:make").weight.shape == (4, 3)
        found = sources_of("theirpackage.inner:make")
        assert set(found) == {"theirpackage/__init__.py", "theirpackage/inner.py", "theirpackage/sizes.py"}
    finally:
        for name in [name for name in sys.modules if name.startswith("theirpackage")]:
            del sys.modules[name]


def test_two_folders_may_have_neighbours_of_the_same_name(nets: str, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other")
    (other / "widths.py").write_text("WIDTH = 7\n")
    model = load(f"ensemble:{nets}:make+{other}/nets.py:make")
    assert [member.members[0].body[1].out_features for member in model.members] == [5, 7]


def test_ensembles_of_anything(nets: str) -> None:
    names_ = f"({nets}:single?width=9)+{nets}:single+{nets}:make"
    assert load(f"ensemble:{names_}?vote=voting").vote == "voting"
    assert load_model(f"ensemble:{names_}", dataset="images.npz", vote="logits").vote == "logits"
    assert load(f"ensemble:{names_}?vote=crossmax").k is None
    assert load(f"crossmax:{names_}?k=2").k == 2
    randomized = load(f"randomized:{names_}?probabilities=0.5,0.3,0.2&per=batch")
    assert randomized.probabilities.tolist() == [0.5, 0.3, 0.2]
    assert functions_in(f"ensemble:{names_}") == [f"{nets}:single?width=9", f"{nets}:single", f"{nets}:make"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nets.py:raises", "nets.py:raises raised KeyError: 'no such thing'"),
        ("nets.py:gpu", "map_location='cpu'"),
        ("nets.py:nothing", "returns a list: let it return a torch.nn.Module"),
        ("nets.py:misspelt", "did you mean 'members'"),
        ("nets.py:mak", "unknown function of nets.py 'mak': did you mean 'make'"),
        ("nets.py:needs", r"needs width: write nets.py:needs\?width=VALUE"),
        ("nets.py:make?member=2", "unknown option of nets.py:make 'member': did you mean 'members'"),
        ("nats.py:make", "there is no file 'nats.py'"),
        ("broken.py:make", "broken.py cannot be imported: ModuleNotFoundError"),
        ("syntax.py:make", "syntax.py cannot be imported: SyntaxError"),
        ("ensemble:nets.py:make", "name at least two models"),
        ("ensemble:nets.py:make+nets.py:single?k=2", "unknown option of ensemble: 'k'"),
        ("randomized:nets.py:make+nets.py:single?probabilities=0.5,0.6", "must be at least 0 and sum to 1"),
        ("crossmax:nets.py:make+nets.py:single?k=3", "k must be at most 2"),
        ("torchvision:resnet17", "did you mean 'resnet1"),
        ("torchvision:resnet18?weights=nowhere.pth", "there is no file 'nowhere.pth'"),
        ("hf:.", "there is no config.json"),
        (".", "holds no model: expected one card"),
        ("nosuch.module:make", "unknown model for images.npz"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(name: str, message: str, nets: str) -> None:
    Path("broken.py").write_text("import nothing_of_this_name\n")
    Path("syntax.py").write_text("def make(:\n")
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_networks_of_torchvision_with_weights_of_ones_own(nets: str) -> None:
    net = load("torchvision:squeezenet1_1?weights=none&num_classes=3")
    save_file(net[1].state_dict(), "mine.safetensors")
    again = load("torchvision:squeezenet1_1?weights=mine.safetensors&num_classes=3")
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(net(x), again(x))
    with pytest.raises(ValueError, match=r"mine\.safetensors does not fit"):
        load("torchvision:squeezenet1_1?weights=mine.safetensors&num_classes=4")


@pytest.mark.filterwarnings("ignore")
def test_folders_of_weights(nets: str) -> None:
    ensemble = load_defense("gal_convnet_3", dataset="digits")
    card = {"architecture": "convnet", "members": 3, "negative_slope": 0.1}
    write_model(Path("ours") / "mine", ensemble, card, half=False)
    x = torch.rand(2, 1, 8, 8)
    assert load_model("ours", dataset="digits", vote="voting").vote == "voting"
    assert load_model("ours", dataset="digits")(x).shape == (2, 10)
    import timm

    net = timm.create_model("resnet10t", num_classes=3)
    Path("theirs").mkdir()
    config = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": {"mean": [0, 0, 0], "std": [0.5, 0.5, 0.5]}}
    Path("theirs/config.json").write_text(json.dumps(config))
    save_file(net.state_dict(), "theirs/model.safetensors")
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(load("theirs")(x), net.eval()(2 * x))


def test_transformers_are_an_extra(nets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("config.json").write_text('{"model_type": "vit"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("hf:.", "."):
        with pytest.raises(ImportError, match=r"needs transformers.*ensemble-attacks\[hf\]"):
            load(name)


def test_the_dataset_that_a_name_implies(nets: str) -> None:
    assert implied_dataset("adp_convnet_3") == "digits"
    assert implied_dataset("ensemble:adp_resnet20_3+gal_resnet20_3") == "cifar10"
    assert implied_dataset("nets.py:single") == "images.npz"
    assert implied_dataset("nets.py:make") is None
    assert implied_dataset("timm:resnet18") is None


def test_the_source_is_the_files_and_its_neighbours(nets: str) -> None:
    before = sources_of(f"{nets}:make")
    assert set(before) == {"nets.py", "widths.py"}
    Path("widths.py").write_text("WIDTH = 6\n")
    after = sources_of(f"{nets}:make")
    assert before["nets.py"] == after["nets.py"]
    assert before["widths.py"] != after["widths.py"]
    assert load(f"{nets}:make").members[0].body[1].out_features == 6
    assert {"python", "torch"} <= set(environment_of(f"{nets}:make"))
    assert "class Net" in NETS


def test_names_are_read_and_made_absolute(nets: str) -> None:
    here = Path.cwd()
    known = {"adp_convnet_3", "theirs"}.__contains__
    for name, expected in {
        "nets.py:make?a=1": f"{here}/nets.py:make?a=1",
        "ensemble:(nets.py:f?a=1)+adp_convnet_3?k=2": f"ensemble:({here}/nets.py:f?a=1)+adp_convnet_3?k=2",
        "images.npz": f"{here}/images.npz",
        "hf:../theirs": f"hf:{here}",
        "theirs": "theirs",
        "timm:resnet18": "timm:resnet18",
        "digits": "digits",
    }.items():
        assert names.absolute(name, known) == expected
    assert isinstance(load(names.absolute("nets.py:make", known)), Ensemble)
