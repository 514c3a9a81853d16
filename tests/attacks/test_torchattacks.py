"""The attacks inside torchattacks' own machinery."""

from __future__ import annotations

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from ensemble_attacks import APGD, MORA, Ensemble
from tests.helpers import make_ensemble, make_member

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def float_batch(batch: tuple[Tensor, Tensor]) -> tuple[Ensemble, Tensor, Tensor]:
    return make_ensemble(dtype=torch.float32), batch[0].float(), batch[1]


@pytest.mark.parametrize("make", [MORA, APGD])
def test_every_argument_but_the_model_has_a_default(make: type) -> None:
    attack = make(make_ensemble())
    assert attack.supported_mode == ["default", "targeted"]
    assert f"{make.__name__}(" in repr(attack)
    assert "eps=0.031" in repr(attack)


def test_multi_attack(batch: tuple[Tensor, Tensor]) -> None:
    model, images, labels = float_batch(batch)
    attacks = [torchattacks.PGD(model, eps=0.1), APGD(model, eps=0.1, steps=10), MORA(model, eps=0.1, steps=10)]
    together = torchattacks.MultiAttack(attacks)(images, labels)
    fooled = lambda x: model(x).argmax(1) != labels  # noqa: E731
    assert (fooled(together) >= fooled(attacks[2](images, labels))).all()


class Normalized(nn.Module):
    """A member that expects normalised images, as an ensemble does whose user calls ``set_normalization_used``."""

    def __init__(self, member: nn.Module) -> None:
        super().__init__()
        self.member = member

    def forward(self, x: Tensor) -> Tensor:
        return self.member(x * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1))


@pytest.mark.parametrize("make", [MORA, APGD])
@pytest.mark.parametrize("inside_multi_attack", [False, True])
def test_normalization(make: type, inside_multi_attack: bool, batch: tuple[Tensor, Tensor]) -> None:
    """eps stays in pixel units, images come and go normalised, and members get the same input as the whole."""
    model, images, labels = float_batch(batch)
    expects_normalized = Ensemble([Normalized(member) for member in model.members], "softmax").eval()
    mean, std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)
    attack = make(expects_normalized, eps=0.1, steps=10)
    if inside_multi_attack:
        attack = torchattacks.MultiAttack([attack, torchattacks.FGSM(expects_normalized, eps=0.1)])
    attack.set_normalization_used(MEAN, STD)
    adversarial = attack((images - mean) / std, labels) * std + mean
    assert (adversarial - images).abs().max() <= 0.1 + 1e-6
    plain = make(model, eps=0.1, steps=10)(images, labels)
    fooled, expected = (model(x).argmax(1) != labels for x in (adversarial, plain))
    assert fooled.sum() >= expected.sum() - 1
    assert fooled.sum() > 20


def test_normalization_takes_float64_arrays(batch: tuple[Tensor, Tensor]) -> None:
    import numpy as np

    model, images, labels = float_batch(batch)
    attack = MORA(model, eps=0.1, steps=3)
    attack.set_normalization_used(np.array(MEAN), np.array(STD))  # type: ignore[arg-type]
    mean, std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)
    assert attack((images - mean) / std, labels).dtype == torch.float32


@pytest.mark.parametrize("make", [MORA, APGD, lambda model, **kw: APGD(model, loss="dlr-targeted", **kw)])
def test_targeted_modes(make: type, batch: tuple[Tensor, Tensor]) -> None:
    model, images, labels = float_batch(batch)
    attack = make(model, eps=0.4, steps=20)
    targets = (labels + 1) % 4
    attack.set_mode_targeted_by_function(lambda x, y: (y + 1) % 4, quiet=True)
    reached = model(attack(images, labels)).argmax(1) == targets
    assert reached.float().mean() > 0.8
    attack.set_mode_targeted_by_label(quiet=True)
    reached = model(attack(images, targets)).argmax(1) == targets
    assert reached.float().mean() > 0.8
    attack.set_mode_targeted_least_likely(quiet=True)
    least = model(images).argmin(1)
    assert (model(attack(images, labels)).argmax(1) == least).float().mean() > 0.5
    attack.set_mode_targeted_random(quiet=True)
    first = attack(images, labels)
    assert torch.equal(attack(images[7:9], labels[7:9]), attack(images, labels)[7:9])
    assert (model(first).argmax(1) != labels).float().mean() > 0.5


def test_save(batch: tuple[Tensor, Tensor], tmp_path: object) -> None:
    model, images, labels = float_batch(batch)
    model.train()
    model.members[1].eval()
    flags = [module.training for module in model.modules()]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=16)
    MORA(model, eps=0.1, steps=3).save(loader, save_path=f"{tmp_path}/adv.pt", verbose=False)
    stored = torch.load(f"{tmp_path}/adv.pt", weights_only=True)
    assert stored["adv_inputs"].shape == images.shape
    assert [module.training for module in model.modules()] == flags


def test_save_with_predictions_and_without_a_word(batch: tuple[Tensor, Tensor], tmp_path: object) -> None:
    model, images, labels = float_batch(batch)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=64)
    attack = MORA(model, eps=0.1, steps=3)
    assert attack.save(loader, f"{tmp_path}/adv.pt", verbose=False, save_predictions=True) is None
    stored = torch.load(f"{tmp_path}/adv.pt", weights_only=True)
    assert torch.equal(stored["preds"], model(stored["adv_inputs"]).argmax(1))
    robust, _, _ = attack.save(loader, verbose=False, return_verbose=True)
    assert robust == pytest.approx(100 * (stored["preds"] == labels).float().mean().item(), abs=1e-3)


def test_set_model_checks_for_members(batch: tuple[Tensor, Tensor]) -> None:
    model, images, labels = float_batch(batch)
    attack = MORA(model, eps=0.1, steps=3)
    with pytest.raises(TypeError, match="member_logits"):
        attack.set_model(make_member())
    other = make_ensemble("logits", dtype=torch.float32)
    attack.set_model(other)
    assert attack(images, labels).shape == images.shape
    attack.set_device("cpu")
    assert attack(images, labels).device.type == "cpu"


@pytest.mark.parametrize("name", ["MORA", "APGD"])
def test_torchattacks_own_attack_test(name: str, monkeypatch: pytest.MonkeyPatch, batch: tuple[Tensor, Tensor]) -> None:
    """What torchattacks' test of its attacks asks: made from the model alone, called in both modes, accuracy not raised."""
    model, images, labels = float_batch(batch)
    monkeypatch.setattr(torchattacks, name, {"MORA": MORA, "APGD": APGD}[name], raising=False)
    attack = getattr(torchattacks, name)(model)
    attack.steps = 10
    clean = (model(images[:5]).argmax(1) == labels[:5]).float().mean()
    for _ in range(2):
        adversarial = attack(images[:5], labels[:5])
        assert (model(adversarial).argmax(1) == labels[:5]).float().mean() <= clean
        attack.set_mode_targeted_random(quiet=True)
