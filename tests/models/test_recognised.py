"""Members that one network computes together, and structures that are recognised without being named.

The libraries' own classes are used where they are installed; small ones of the same names and attributes otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from defenses.randomized import RandomizedEnsemble
from ensemble_attacks import MORA, AggregateMismatchError, Ensemble, NotAnEnsembleError, as_ensemble, judge
from ensemble_attacks.diagnostics import diagnose
from ensemble_attacks.models.providers import load_model
from ensemble_attacks.models.twins import prepare
from tests.helpers import make_ensemble, make_member

Batch = tuple[Tensor, Tensor]
VOTES_OF: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_MNK: logits_MNK.softmax(-1).mean(0),
    "logits": lambda logits_MNK: logits_MNK.mean(0).softmax(-1),
    "voting": lambda logits_MNK: nn.functional.one_hot(logits_MNK.argmax(-1).mode(0).values, logits_MNK.shape[-1]).double(),
}


def nets(count: int = 3) -> list[nn.Module]:
    return [make_member(seed=seed).double() for seed in range(count)]


class Packed(nn.Module):
    """One network that computes three members, and shows the mean of their probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_member(12).double()

    def members(self, x: Tensor) -> Tensor:
        return self.net(x).unflatten(1, (3, 4)).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.members(x).softmax(-1).mean(0)


class Theirs(nn.Module):
    """Some code around a list of networks and another one of layers."""

    def __init__(self, vote: str) -> None:
        super().__init__()
        self.stem = nn.ModuleList([nn.Identity(), nn.Flatten()])
        self.nets = nn.ModuleList(nets())
        self.vote = VOTES_OF[vote]  # a function that is no `Vote`

    def forward(self, x: Tensor) -> Tensor:
        return self.vote(torch.stack([net(self.stem[0](x)) for net in self.nets]))


class Estimators(nn.Module):
    """As torchensemble keeps its members."""

    decide: Callable[[Tensor], Tensor]

    def __init__(self, members: list[nn.Module], voting_strategy: str = "soft") -> None:
        super().__init__()
        self.estimators_ = nn.ModuleList(members)
        self.voting_strategy = voting_strategy

    def forward(self, x: Tensor) -> Tensor:
        return type(self).decide(torch.stack([net(x) for net in self.estimators_]))


class Stacked(nn.Module):
    """As torch-uncertainty's networks answer: the rows of one member after those of another."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.core_models = nn.ModuleList(members)
        self.num_estimators = len(members)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x) for net in self.core_models])


class ByImage(Stacked):
    """The rows of one image after those of another."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.core_models], 1).flatten(0, 1)


def test_a_function_names_members_that_are_no_submodules(batch: Batch) -> None:
    x, _ = batch
    model = Packed().eval()
    labels = model(x).argmax(1)
    adopted = as_ensemble(model, member_logits=model.members, vote="softmax", inputs=x)
    assert torch.equal(adopted(x), model(x))
    assert torch.equal(adopted.member_logits(x), model.members(x))  # type: ignore[operator]
    x_adv = MORA(adopted, eps=0.2, steps=20)(x, labels)
    assert judge(model, x, labels, x_adv, eps=0.2).accuracy < 0.7


@pytest.mark.parametrize("vote", ["softmax", "voting"])
def test_the_attack_is_that_on_the_members_as_networks(vote: str, batch: Batch) -> None:
    """Three networks in one function, as a tensor, a list, or rows: MORA finds the same images as on the three."""
    x, labels = batch
    plain = make_ensemble(vote)
    expected = MORA(plain, eps=0.1, steps=5)(x, labels)
    shown = [
        lambda x: torch.stack([net(x) for net in plain.members]),
        lambda x: [net(x) for net in plain.members],
        lambda x: torch.cat([net(x) for net in plain.members]),
    ]
    for member_logits in shown:
        adopted = as_ensemble(plain, member_logits=member_logits, vote=vote, inputs=x)
        assert torch.equal(MORA(adopted, eps=0.1, steps=5)(x, labels), expected)


def test_a_function_in_training_mode_is_guarded(batch: Batch) -> None:
    """The network behind the function, which is no part of the model, is asked in eval mode, and left as it was."""
    net = make_member(12).double().train()
    before = copy.deepcopy(net.state_dict())

    def members(x: Tensor) -> Tensor:
        return net(x).unflatten(1, (3, 4)).transpose(0, 1)

    class Behind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return members(x).softmax(-1).mean(0)

    as_ensemble(Behind(), member_logits=members, inputs=batch[0])
    assert net.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_false_claims_for_a_function_are_refused(batch: Batch) -> None:
    x, _ = batch
    model = Packed().eval()
    with pytest.raises(AggregateMismatchError, match="name the right vote"):
        as_ensemble(model, member_logits=lambda x: model.members(1 - x), inputs=x)
    with pytest.raises(AggregateMismatchError, match="members come first"):  # (N, M, K), as rows
        as_ensemble(model, member_logits=lambda x: model.members(x).transpose(0, 1).flatten(0, 1), inputs=x)
    with pytest.raises(ValueError, match=r"returns \(8, 4\) for 8 images: expected one tensor \(M, 8, K\)"):
        as_ensemble(model, member_logits=model, inputs=x)
    with pytest.raises(TypeError, match="pass one of them"):
        as_ensemble(model, ["net"], member_logits=model.members)
    with pytest.raises(TypeError, match="a function of images"):
        as_ensemble(model, member_logits=3)  # type: ignore[arg-type]


def test_weights_go_with_members_of_a_function(batch: Batch) -> None:
    x, _ = batch
    model = Ensemble(nets(), "softmax", weights=[3, 1, 1]).eval()
    adopted = as_ensemble(model, member_logits=model.member_logits, weights=[3, 1, 1], inputs=x)
    assert torch.equal(adopted(x), model(x))
    with pytest.raises(ValueError, match="made for 2 members, there are 3"):
        as_ensemble(model, member_logits=model.member_logits, weights=[3, 1], inputs=x)


@pytest.mark.parametrize("shape", [list, tuple, nn.ModuleList, lambda given: dict(enumerate(given))])
def test_lists_of_networks(shape: Any, batch: Batch) -> None:
    x, _ = batch
    model = as_ensemble(shape(nets()), vote="voting", inputs=x)
    assert model.found == "a list of 3 networks"
    assert not model.training
    assert torch.equal(model(x), make_ensemble("voting")(x))
    twice = as_ensemble(shape(nets(1) * 2))
    assert len(twice.members) == 2  # type: ignore[arg-type]
    assert as_ensemble(shape(nets()), vote=lambda logits_MNK: logits_MNK.amax(0))(x).shape == (64, 4)


def test_wrappers_of_ensembles(batch: Batch) -> None:
    x, labels = batch

    class LightningModule(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    ensemble = make_ensemble("voting")
    expected = MORA(ensemble, eps=0.1, steps=5)(x, labels)
    for wrapper in (nn.DataParallel(ensemble), AveragedModel(ensemble), LightningModule(AveragedModel(ensemble))):
        adopted = as_ensemble(wrapper.eval(), inputs=x)
        assert str(adopted.found).startswith("Ensemble in .m")
        assert torch.equal(MORA(adopted, eps=0.1, steps=5)(x, labels), expected)
    with pytest.raises(NotAnEnsembleError, match=r"draws its members.*pass \.module"):
        as_ensemble(nn.DataParallel(RandomizedEnsemble(nets(), seed=0)))
    stacked = as_ensemble(LightningModule(Stacked(nets())).eval(), inputs=x)
    assert torch.equal(stacked(x), make_ensemble("softmax")(x))


TORCHENSEMBLE = {
    "VotingClassifier": "softmax",
    "BaggingClassifier": "softmax",
    "SnapshotEnsembleClassifier": "softmax",
    "AdversarialTrainingClassifier": "softmax",
    "FusionClassifier": "logits",
    "FastGeometricClassifier": "logits",
    "GradientBoostingClassifier": "logits",
    "SoftGradientBoostingClassifier": "logits",
}


@pytest.mark.parametrize(("name", "vote"), [*TORCHENSEMBLE.items(), ("VotingClassifier", "voting")])
def test_torchensembles_classes_by_name(name: str, vote: str, batch: Batch) -> None:
    x, _ = batch
    kind = type(name, (Estimators,), {"decide": staticmethod(VOTES_OF[vote])})
    model = kind(nets(), "hard" if vote == "voting" else "soft").eval()
    adopted = as_ensemble(model, inputs=x)
    assert (adopted.vote, adopted.found) == (vote, f"torchensemble's {name}, 3 estimators")
    assert adopted.checked == "64 images and 192 mixtures of them"
    assert "checked on 64 images" in repr(adopted)
    with pytest.raises(NotAnEnsembleError, match="fit it"):
        as_ensemble(kind([]))


def test_what_a_class_is_called_is_a_claim_that_is_checked(batch: Batch) -> None:
    kind = type("VotingClassifier", (Estimators,), {"decide": staticmethod(lambda z_MNK: z_MNK.amin(0))})
    with pytest.raises(AggregateMismatchError, match="name the right vote"):
        as_ensemble(kind(nets()).eval(), inputs=batch[0])
    adopted = as_ensemble(kind(nets()).eval())
    with pytest.raises(AggregateMismatchError, match="name the right vote"):
        MORA(adopted, eps=0.1, steps=5)(*batch)


def test_rows_of_all_members(batch: Batch) -> None:
    x, labels = batch
    model = as_ensemble(Stacked(nets()).eval(), inputs=x)
    assert "num_estimators=3" in str(model.found)
    plain = make_ensemble("softmax")
    assert torch.equal(model(x), plain(x))
    assert torch.equal(MORA(model, eps=0.1, steps=5)(x, labels), MORA(plain, eps=0.1, steps=5)(x, labels))
    assert torch.equal(as_ensemble(Stacked(nets()).eval(), vote="voting")(x), make_ensemble("voting")(x))
    torch.testing.assert_close(prepare(model, x)(x), model(x))
    with pytest.raises(AggregateMismatchError, match="members come first"):
        as_ensemble(ByImage(nets()).eval(), inputs=x)


@pytest.mark.parametrize("vote", VOTES_OF)
def test_a_list_of_networks_in_somebody_elses_code_is_tried(vote: str, batch: Batch) -> None:
    x, _ = batch
    model = Theirs(vote).eval()
    adopted = as_ensemble(model, inputs=x)
    assert str(adopted.found).startswith(f"3 networks in nets, by {vote}")
    assert torch.equal(adopted(x), model(x))
    with pytest.raises(NotAnEnsembleError, match="it holds 'stem', 'nets', to be tried where inputs are passed"):
        as_ensemble(model)
    with pytest.raises(NotAnEnsembleError, match="none of which predicts as it does"):
        as_ensemble(model, vote=lambda logits_MNK: logits_MNK.amin(0), inputs=x)


def test_num_estimators_of_a_model_with_scores_of_its_own(batch: Batch) -> None:
    class Own(Stacked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).unflatten(0, (-1, len(x))).mean(0)

    adopted = as_ensemble(Own(nets()).eval(), inputs=batch[0])
    assert str(adopted.found).startswith("3 networks in core_models, by logits")


def test_what_is_not_recognised_is_told_how_to_be_named(batch: Batch) -> None:
    for inputs in (None, batch[0]):
        with pytest.raises(NotAnEnsembleError) as told:
            as_ensemble(make_member().double(), inputs=inputs)
        for said in ("DataParallel", "torchensemble", "num_estimators", "members=[...]", "member_logits=function"):
            assert said in str(told.value)


def test_diagnose_says_what_was_recognised(batch: Batch) -> None:
    x, labels = (part[:8] for part in batch)
    model = as_ensemble(Stacked(nets(2)).eval())
    (members,) = (check for check in diagnose(model, x, labels, eps=0.1).checks if check.name == "members")
    assert "num_estimators=2" in members.meaning


def test_a_file_names_a_function_of_members(tmp_path: Path) -> None:
    file = tmp_path / "packed.py"
    file.write_text(PACKED)
    model = load_model(f"{file}:packed", dataset="digits")
    assert model.member_logits(torch.rand(5, 1, 8, 8)).shape == (2, 5, 10)  # type: ignore[operator]


PACKED = """
from torch import nn

class Packed(nn.Sequential):
    def members(self, x):
        return super().forward(x).unflatten(1, (2, 10)).transpose(0, 1)

    def forward(self, x):
        return self.members(x).mean(0)

def packed():
    model = Packed(nn.Flatten(), nn.Linear(64, 20))
    return model, {"member_logits": model.members, "vote": "logits"}
"""


def linear(drop: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 16), nn.ReLU(), nn.Dropout(drop), nn.Linear(16, 4))


@pytest.mark.parametrize("name", TORCHENSEMBLE)
def test_torchensemble_itself(name: str) -> None:
    library = pytest.importorskip("torchensemble", reason="torchensemble is not installed")
    model = getattr(library, name)(estimator=linear(), n_estimators=3, cuda=False)
    model.estimators_.extend(linear() for _ in range(3))
    x = torch.rand(16, 3, 16, 16)
    adopted = as_ensemble(model.eval(), inputs=x)
    assert adopted.vote == TORCHENSEMBLE[name]
    assert torch.equal(adopted(x), model(x))


@pytest.mark.parametrize("name", ["deep", "packed", "mimo", "masked", "batched", "collector", "dropout", "swa"])
def test_torch_uncertainty_itself(name: str) -> None:
    methods = pytest.importorskip("torch_uncertainty.methods", reason="torch-uncertainty is not installed")
    models = pytest.importorskip("torch_uncertainty.models", reason="torch-uncertainty is not installed")
    resnet = {
        "in_channels": 3,
        "num_classes": 4,
        "arch": 18,
        "num_estimators": 4,
        "style": "cifar",
        "width_multiplier": 0.25,
    }

    def collected() -> nn.Module:
        collector = methods.CheckpointCollector(linear(), save_schedule=[0, 1, 2])
        for epoch in range(3):
            collector.update_wrapper(epoch)
        return collector

    made: dict[str, Callable[[], nn.Module]] = {
        "deep": lambda: methods.deep_ensembles([linear() for _ in range(4)]),
        "packed": lambda: models.packed_resnet(alpha=2, gamma=1, **resnet),
        "mimo": lambda: models.mimo_resnet(**resnet),
        "masked": lambda: models.masked_resnet(scale=2.0, **resnet),
        "batched": lambda: models.batched_resnet(**resnet),
        "collector": collected,
        "dropout": lambda: methods.mc_dropout(linear(0.5), num_estimators=4),
        "swa": lambda: methods.SWA(methods.deep_ensembles([linear() for _ in range(4)]), 0, 1),
    }
    torch.manual_seed(0)
    model, x = made[name]().eval(), torch.rand(8, 3, 16, 16)
    adopted = as_ensemble(model, inputs=x)
    shown = adopted.member_logits(x)  # type: ignore[operator]
    assert shown.shape == (4, 8, 4)
    if name == "dropout":
        assert not torch.equal(shown, adopted.member_logits(x))  # type: ignore[operator]
    else:
        assert torch.equal(adopted(x).argmax(1), model(x).unflatten(0, (-1, 8)).softmax(-1).mean(0).argmax(1))
