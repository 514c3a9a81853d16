"""Published checkpoints, and ensembles of other people's models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from defenses import convert, load_model
from defenses.zoo.cards import make_ensemble
from defenses.zoo.convert import ensemble_from_checkpoint
from ensemble_attacks.errors import WeightsError
from ensemble_attacks.hosts.robustbench import ensure

X = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def member_state(architecture: str = "resnet20b", seed: int = 0, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return make_ensemble(architecture, 1, **options).members[0].state_dict()


def dverge_layout(states: list[dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    theirs = {}
    for index, state in enumerate(states):
        names = {key: key.replace("shortcut", "downsample").replace("linear", "fc") for key in state}
        member = {f"model.{names[key]}": value for key, value in state.items()}
        member["normalizer.mean"], member["normalizer.std"] = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
        theirs[f"model_{index}"] = member
    return theirs


def expected(states: list[dict[str, Tensor]], architecture: str = "resnet20b", **options: Any) -> Tensor:
    ensemble = make_ensemble(architecture, len(states), **options).eval()
    for member, state in zip(ensemble.members, states, strict=True):
        member.load_state_dict(state)
    return ensemble.member_logits(X)


def test_dverges_layout(tmp_path: Path) -> None:
    states = [member_state(seed=seed) for seed in range(11)]
    torch.save(dverge_layout(states), tmp_path / "epoch_200.pth")
    normalization = ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    loaded = load_model("dverge_resnet20_11", checkpoint=tmp_path / "epoch_200.pth", vote="voting")
    assert loaded.vote == "voting"
    torch.testing.assert_close(loaded.member_logits(X), expected(states, normalization=normalization))
    gal = load_model("gal_resnet20_11", checkpoint=tmp_path / "epoch_200.pth", negative_slope=0.1)
    torch.testing.assert_close(gal.member_logits(X), expected(states, normalization=normalization, negative_slope=0.1))

    card = convert([tmp_path / "epoch_200.pth"], "theirs", model_dir=tmp_path / "models")
    assert card.name == "theirs.json"
    again = load_model("theirs", tmp_path / "models")
    torch.testing.assert_close(again.member_logits(X), loaded.member_logits(X), rtol=0, atol=0)


def with_training_state(state: dict[str, Tensor]) -> dict[str, object]:
    buffers = {index: {"momentum_buffer": value} for index, value in enumerate(state.values())}
    return {
        "best_acc1": torch.tensor(91.0),
        "optimizer": {"state": buffers, "param_groups": [{"lr": 0.1}]},
        "state_dict": state,
    }


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "best_prec1": 91.0}, lambda s: [s], with_training_state]
)
def test_single_networks(wrap: Callable[[dict[str, Tensor]], object], tmp_path: Path) -> None:
    states = [member_state("resnet20", seed) for seed in range(2)]
    for index, state in enumerate(states):
        torch.save(wrap({f"module.{key}": value for key, value in state.items()}), tmp_path / f"{index}.th")
    ensemble, card = ensemble_from_checkpoint([tmp_path / "0.th", tmp_path / "1.th"], normalization="imagenet")
    imagenet = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(ensemble.member_logits(X), expected(states, "resnet20", normalization=imagenet))
    assert card["architecture"] == "resnet20"


def test_other_names_of_the_same_layers(tmp_path: Path) -> None:
    state = member_state()
    names = {key: key.replace("conv", "conv_").replace("bn", "bn_").replace("layer", "stage_") for key in state}
    names = {key: name.replace("shortcut", "downsample").replace("linear", "fc") for key, name in names.items()}
    torch.save({names[key]: value for key, value in state.items()}, tmp_path / "net.pth")
    ensemble, _ = ensemble_from_checkpoint([tmp_path / "net.pth"])
    torch.testing.assert_close(ensemble.member_logits(X), expected([state]))


def test_bad_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_model("dverge_resnet20_3", checkpoint=tmp_path / "absent.pth")
    torch.save(make_ensemble("convnet", 1), tmp_path / "pickled.pth")
    with pytest.raises(WeightsError, match="cannot be read as plain weights"):
        load_model("dverge_resnet20_3", checkpoint=tmp_path / "pickled.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(WeightsError, match="cannot be read as plain weights"):
        load_model("dverge_resnet20_3", checkpoint=tmp_path / "text.pth")
    half = dverge_layout([member_state()])
    del half["model_0"]["normalizer.std"]
    torch.save(half, tmp_path / "half.pth")
    with pytest.raises(WeightsError, match="there is a mean, but not the other"):
        load_model("dverge_resnet20_1", checkpoint=tmp_path / "half.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(WeightsError, match="holds no CIFAR ResNet"):
        load_model("dverge_resnet20_3", checkpoint=tmp_path / "empty.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    with pytest.raises(WeightsError, match="no CIFAR ResNet"):
        load_model("dverge_resnet20_3", checkpoint=tmp_path / "vgg.pth")
    torch.save(dverge_layout([member_state(), member_state(seed=1)]), tmp_path / "two.pth")
    with pytest.raises(WeightsError, match="what it holds is dverge_resnet20b_2"):
        load_model("dverge_resnet20_3", checkpoint=tmp_path / "two.pth")
    with pytest.raises(ValueError, match="<defense>_<architecture>_<members>"):
        load_model("dverge", checkpoint=tmp_path / "two.pth")
    (tmp_path / "hello.pth").write_text("hello world")
    (tmp_path / "nothing.pth").write_bytes(b"")
    for name in ("hello", "nothing"):
        with pytest.raises(WeightsError, match="cannot be read as plain weights"):
            load_model("dverge_resnet20_3", checkpoint=tmp_path / f"{name}.pth")
    broken = member_state()
    broken["layer2.0.conv1.weight"] = broken["layer2.0.conv1.weight"][:5]
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(WeightsError, match=r"not a resnet20b.*size mismatch"):
        convert([tmp_path / "broken.pth"], "broken", model_dir=tmp_path / "models")
    torch.save(member_state("resnet20", num_classes=7), tmp_path / "seven.pth")
    torch.save(member_state("resnet20"), tmp_path / "ten.pth")
    with pytest.raises(WeightsError, match="the members differ"):
        convert([tmp_path / "seven.pth", tmp_path / "ten.pth"], "mixed", model_dir=tmp_path / "models")
    with pytest.raises(WeightsError, match="has 7 classes, cifar10 has 10"):
        load_model("dverge_resnet20_1", checkpoint=tmp_path / "seven.pth")
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        convert([tmp_path / "ten.pth"], "ten", model_dir=tmp_path / "models", dataset="cifr10")
    with pytest.raises(ValueError, match="negative_slope is nan"):
        convert([tmp_path / "ten.pth"], "ten", model_dir=tmp_path / "models", negative_slope=float("nan"))
    with pytest.raises(ValueError, match="did you mean 'imagenet'"):
        convert([tmp_path / "ten.pth"], "ten", model_dir=tmp_path / "models", normalization="imagnet")
    for name in ("../ten", "ten_1.0", "modèle", "-x", "x" * 300):
        with pytest.raises(ValueError, match="use letters, digits"):
            convert([tmp_path / "ten.pth"], name, model_dir=tmp_path / "models")
    assert not (tmp_path / "models").exists()
    convert([tmp_path / "ten.pth"], "ten", model_dir=tmp_path / "models")
    with pytest.raises(FileExistsError, match="already holds"):
        convert([tmp_path / "ten.pth"], "ten", model_dir=tmp_path / "models")


def test_the_slope_is_stated(tmp_path: Path) -> None:
    """By an argument or the checkpoint: a name alone states no activation."""
    state = member_state("resnet20")
    torch.save([state], tmp_path / "gal.pth")
    for load in (
        lambda: convert(tmp_path / "gal.pth", "GAL_resnet20_1", model_dir=tmp_path),
        lambda: load_model("gal_resnet20_1", checkpoint=tmp_path / "gal.pth"),
    ):
        with pytest.raises(WeightsError, match=r"stated by no argument and not by the checkpoint: pass 0.1"):
            load()
    convert(tmp_path / "gal.pth", "GAL_resnet20_1", model_dir=tmp_path, negative_slope=0.1)
    sloping = expected([state], "resnet20", negative_slope=0.1)
    straight = expected([state], "resnet20")
    torch.testing.assert_close(load_model("GAL_resnet20_1", tmp_path).member_logits(X), sloping)
    loaded = load_model("gal_resnet20_1", checkpoint=tmp_path / "gal.pth", negative_slope=0.1)
    torch.testing.assert_close(loaded.member_logits(X), sloping)
    convert(tmp_path / "gal.pth", "gal_relu", model_dir=tmp_path, negative_slope=0.0)
    torch.testing.assert_close(load_model("gal_relu", tmp_path).member_logits(X), straight)
    convert(tmp_path / "gal.pth", "galaxy", model_dir=tmp_path)
    torch.testing.assert_close(load_model("galaxy", tmp_path).member_logits(X), straight)

    for saying, found in (
        ({"args": {"negative_slope": 0.1}}, sloping),
        ({"config": {"activation": "ReLU"}}, straight),
        ({"leaky_relu": False}, straight),
    ):
        torch.save({"nets": [state], **saying}, tmp_path / "said.pth")
        torch.testing.assert_close(load_model("gal_resnet20_1", checkpoint=tmp_path / "said.pth").member_logits(X), found)
    with pytest.raises(WeightsError, match=r"said to be 0.0 and 0.1"):
        load_model("gal_resnet20_1", checkpoint=tmp_path / "said.pth", negative_slope=0.1)


@pytest.mark.parametrize("prefix", ["members.{}.", "module.models.{}.", "model_{}.", "net{}.backbone."])
def test_the_state_dict_of_a_whole_ensemble(prefix: str, tmp_path: Path) -> None:
    states = [member_state("resnet20", seed) for seed in range(11)]
    flat = {prefix.format(index) + key: value for index, state in enumerate(states) for key, value in state.items()}
    torch.save({"state_dict": flat, "epoch": 3}, tmp_path / "flat.pth")
    loaded = load_model("dverge_resnet20_11", checkpoint=tmp_path / "flat.pth")
    torch.testing.assert_close(loaded.member_logits(X), expected(states, "resnet20"))
    normalization = ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    torch.save(
        {"norm.mean": torch.tensor(normalization[0]), "norm.std": torch.tensor(normalization[1]), **flat}, tmp_path / "n"
    )
    loaded = load_model("dverge_resnet20_11", checkpoint=tmp_path / "n")
    torch.testing.assert_close(loaded.member_logits(X), expected(states, "resnet20", normalization=normalization))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": "net", "best_state_dict": "net"}, "networks called best_state_dict, state_dict"),
        ({"model": "net", "ema": "net"}, "networks called ema, model"),
        ({"conv1.weight": "nan"}, "not finite"),
        ({"net": "net", "mean": torch.zeros(3), "std": torch.zeros(3)}, "expected numbers above 0"),
        ({"net": "net", "mean": torch.zeros(4), "std": torch.ones(4)}, "one for each of 3 channels"),
        ({"net": "net", 0: torch.zeros(2)}, "Unexpected key"),
    ],
)
def test_checkpoints_that_would_make_another_model(content: dict, message: str, tmp_path: Path) -> None:
    state = member_state("resnet20")
    given: dict = {}
    for key, value in content.items():
        if key == "net":
            given |= state
        elif isinstance(value, str):
            given |= {**state, key: state[key] * float("nan")} if value == "nan" else {key: state}
        else:
            given[key] = value
    torch.save(given, tmp_path / "net.pth")
    with pytest.raises(WeightsError, match=message):
        convert(tmp_path / "net.pth", "net", model_dir=tmp_path)
    assert not (tmp_path / "cifar10").exists()


def test_checkpoints_without_end(tmp_path: Path) -> None:
    content: list = []
    content.append(content)
    torch.save(content, tmp_path / "endless.pth")
    with pytest.raises(WeightsError, match="holds no CIFAR ResNet"):
        convert(tmp_path / "endless.pth", "net", model_dir=tmp_path)
    with pytest.raises(ValueError, match="paths is empty"):
        convert([], "net", model_dir=tmp_path)
    torch.save([member_state("resnet20")] * 2, tmp_path / "two.pth")
    with pytest.raises(WeightsError, match="what it holds is x_resnet20_2"):
        convert(tmp_path / "two.pth", "x_resnet20_3", model_dir=tmp_path)


def test_an_ensemble_of_our_models() -> None:
    model = load_model("ensemble:adp_convnet_3+standard_convnet_3", dataset="digits", vote="logits")
    x = torch.rand(3, 1, 8, 8)
    assert model.member_logits(x).shape == (2, 3, 10)
    torch.testing.assert_close(model.member_logits(x)[1], load_model("standard_convnet_3", dataset="digits")(x))


@pytest.mark.filterwarnings("ignore")  # of what timm and robustbench import
def test_an_ensemble_of_robustbench_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown model for cifar10.*did you mean 'Rice2020Overfitting'"):
        load_model("ensemble:standard_resnet20_3+Rice2020Overfiting")
    ensure()
    from robustbench.model_zoo.enums import ThreatModel
    from robustbench.model_zoo.models import cifar_10_models

    folder = tmp_path / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    net = cifar_10_models[ThreatModel.Linf]["Andriushchenko2020Understanding"]["model"]().eval()
    torch.save({"last": net.state_dict()}, folder / "Andriushchenko2020Understanding.pt")
    model = load_model("ensemble:standard_resnet20_3+Andriushchenko2020Understanding", tmp_path)
    torch.testing.assert_close(model.member_logits(X)[1], net(X))
    torch.testing.assert_close(load_model("robustbench:Andriushchenko2020Understanding", tmp_path)(X), net(X))
    with pytest.raises(ValueError, match="did you mean 'Andriushchenko2020Understanding'"):
        load_model("robustbench:Andriushchenko2020Understandin", tmp_path)
    assert "autoattack" not in sys.modules


@pytest.mark.filterwarnings("ignore")
def test_an_ensemble_of_timm_models(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, pretrained=False))  # no network
    model = load_model("ensemble:timm/resnet10t+timm/resnet14t")
    assert model.member_logits(torch.rand(2, 3, 64, 64)).shape == (2, 2, 1000)
    assert load_model("timm:resnet10t")(torch.rand(2, 3, 64, 64)).shape == (2, 1000)
    with pytest.raises(ValueError, match="the same classes"):
        load_model("ensemble:timm/resnet10t+standard_resnet20_3")
    with pytest.raises(ValueError, match=r"'timm/vit_tiny_patch16_224' does not take the \(3, 32, 32\) images"):
        load_model("ensemble:timm/vit_tiny_patch16_224+timm/resnet10t")
    with pytest.raises(ValueError, match="did you mean 'adp_convnet_3'"):
        load_model("ensemble:apd_convnet_3+gal_convnet_3", dataset="digits")
    with pytest.raises(ValueError, match="unknown timm model 'resnet10x'"):
        load_model("ensemble:timm/resnet10x+standard_resnet20_3")


def test_ensembles_that_cannot_be() -> None:
    for name in ("ensemble:Standard", "ensemble:", "ensemble:A+"):
        with pytest.raises(ValueError, match="at least two models"):
            load_model(name)
