"""Models that ship load, are what their cards say, and nothing else is accepted in their place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from defenses import list_models, load_model, model_card
from defenses.adp import adp_loss, ensemble_entropy, log_ensemble_diversity
from defenses.zoo.load import SHIPPED
from ensemble_attacks import WeightsError, judge
from ensemble_attacks.data import load_dataset
from tests.helpers import slow_but


def card_of(dataset: str, name: str) -> dict[str, Any]:
    return json.loads((SHIPPED / dataset / "Linf" / f"{name}.json").read_text())


RANDOM = [name for name in list_models("digits") if name.startswith(("multiresolution", "purified"))]


@pytest.mark.parametrize("name", sorted(set(list_models("digits")) - set(RANDOM)))
@pytest.mark.parametrize("vote", ["softmax", "voting", "logits"])
def test_digits_models_have_the_clean_accuracy_of_their_cards(name: str, vote: str) -> None:
    x, y = load_dataset("digits")
    model = load_model(name, dataset="digits", threat_model="Linf", vote=vote)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        accuracy = 100 * (model(x).argmax(1) == y).double().mean().item()
    assert accuracy == pytest.approx(card_of("digits", name)["clean_accuracy"][vote], abs=0.2)
    assert accuracy > 97


@pytest.mark.parametrize("name", RANDOM)
def test_random_models_have_about_the_clean_accuracy_of_their_cards(name: str) -> None:
    x, y = load_dataset("digits")
    model = load_model(name, dataset="digits")
    accuracy = 100 * judge(model, x, y, x, eps=0.1, draws=10).accuracy
    clean = card_of("digits", name)["clean_accuracy"]
    assert accuracy == pytest.approx(clean.get("softmax", clean.get("crossmax")), abs=4)


@pytest.mark.parametrize("name", slow_but(["gal_resnet20_3"], list_models("cifar10")))
def test_cifar10_models_have_about_the_clean_accuracy_of_their_cards(name: str, cifar10_dir: Path) -> None:
    x, y = load_dataset("cifar10", data_dir=cifar10_dir, n=500)
    model = load_model(name)
    with torch.no_grad():
        accuracy = 100 * (model(x).argmax(1) == y).double().mean().item()
    clean = card_of("cifar10", name)["clean_accuracy"]
    assert accuracy == pytest.approx(clean.get("softmax", clean.get("crossmax")), abs=5)


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_every_model_has_its_members_and_a_full_card(dataset: str) -> None:
    for name in list_models(dataset):
        card = card_of(dataset, name)
        assert len(getattr(load_model(name, dataset=dataset), "members", [None])) == card["members"]
        assert name.endswith(f"_{card['members']}")
        assert {"recipe", "seed", "epochs", "seconds", "hardware"} <= card["training"].keys()


def test_robustbenchs_enums_are_understood() -> None:
    class Enum:
        value = "digits"

    digits: Any = Enum()
    assert load_model("adp_convnet_3", dataset=digits, norm="Linf").vote == "softmax"
    assert model_card("adp_convnet_3", dataset=digits)["members"] == 3
    assert "adp_convnet_3" in list_models(digits)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'adp_convnet_3'"):
        load_model("apd_convnet_3", dataset="digits")
    with pytest.raises(ValueError, match="did you mean 'gal_convnet_3'"):
        load_model("GAL_convnet_3", dataset="digits")
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        load_model("adp_convnet_3", dataset="cifar-10")
    with pytest.raises(ValueError, match="unknown threat model 'L2'"):
        load_model("adp_convnet_3", dataset="digits", threat_model="L2")
    with pytest.raises(ValueError, match="unknown vote"):
        load_model("adp_convnet_3", dataset="digits", vote="mean")
    with pytest.raises(ValueError, match="unknown dataset"):
        list_models("mnst")


def test_corrupted_weights_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "digits" / "Linf"
    shutil.copytree(SHIPPED / "digits" / "Linf", folder)
    assert load_model("adp_convnet_3", tmp_path, "digits")
    weights = folder / "adp_convnet_3.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(WeightsError, match="sha256"):
        load_model("adp_convnet_3", tmp_path, "digits")
    for text, message in (
        ("", "no JSON"),
        ("[]", "does not say its architecture"),
        ('{"members": "3"}', "members, sha256"),
    ):
        (folder / "trs_convnet_3.json").write_text(text)
        with pytest.raises(WeightsError, match=message):
            load_model("trs_convnet_3", tmp_path, "digits")
    weights.unlink()
    with pytest.raises(WeightsError, match="missing"):
        load_model("adp_convnet_3", tmp_path, "digits")


def test_adps_terms_on_known_predictions() -> None:
    """Orthogonal non-true predictions: determinant 1; equal ones: rank 1, so about 1e-6 times their number."""
    orthogonal = torch.tensor([[[0.6, 0.4, 0.0, 0.0]], [[0.6, 0.0, 0.4, 0.0]], [[0.6, 0.0, 0.0, 0.4]]], dtype=torch.float64)
    label = torch.tensor([0])
    assert log_ensemble_diversity(orthogonal, label).item() == pytest.approx(0, abs=1e-5)
    equal = orthogonal[:1].expand(3, -1, -1)
    assert log_ensemble_diversity(equal, label).item() < -25
    uniform = torch.full((3, 1, 4), 0.25, dtype=torch.float64)
    assert ensemble_entropy(uniform).item() == pytest.approx(torch.log(torch.tensor(4.0)).item())


def test_adps_loss_is_the_sum_of_its_terms() -> None:
    logits = torch.randn(3, 6, 5, dtype=torch.float64)
    labels = torch.arange(6) % 5
    p = logits.softmax(-1)
    cross_entropy = -sum(p[m, range(6), labels].log().mean() for m in range(3))
    expected = cross_entropy - 2 * ensemble_entropy(p).mean() - 0.5 * log_ensemble_diversity(p, labels).mean()
    torch.testing.assert_close(adp_loss(logits, labels), expected)
    torch.testing.assert_close(adp_loss(logits, labels, alpha=0, beta=0), cross_entropy)
