"""Whatever holds images and labels is taken wherever tensors are, and read once; what cannot be used is told in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ensemble_attacks import MORA, AutoAttack, Box, Ensemble, evaluate, judge
from ensemble_attacks.data import as_tensors
from ensemble_attacks.diagnostics import diagnose
from ensemble_attacks.evaluation.runner import evaluate as run_evaluation
from ensemble_attacks.evaluation.settings import Settings
from tests.helpers import make_ensemble

X = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
MODEL = make_ensemble("voting", dtype=torch.float32)
Y = MODEL(X).argmax(1)
EPS = 0.05


def accuracy_of_clean(model: nn.Module, data: Any) -> float:
    return AutoAttack(model, eps=EPS, verbose=False).clean_accuracy(data)


def robust_of_autoattack(model: nn.Module, data: Any) -> list[bool]:
    adversary = AutoAttack(model, eps=EPS, seed=0, verbose=False, attacks_to_run=["torchattacks:FGSM"])
    adversary.run_standard_evaluation(data, bs=np.int64(4))  # type: ignore[arg-type]
    return adversary.robust.tolist()  # type: ignore[no-any-return]


TAKERS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "judge": lambda model, data: judge(model, data, x_adv=X, eps=EPS).summary(),
    "clean accuracy": accuracy_of_clean,
    "AutoAttack": robust_of_autoattack,
    "runner": lambda model, data: run_evaluation(model, data, None, ["torchattacks:FGSM"], Settings(EPS)),
}
FORMS: dict[str, Callable[[], Any]] = {
    "a Dataset": lambda: TensorDataset(X, Y),
    "a DataLoader": lambda: DataLoader(TensorDataset(X, Y), batch_size=3),
    "arrays": lambda: (X.numpy(), Y.numpy()),
}


@pytest.mark.parametrize("name", TAKERS)
def test_data_are_taken_wherever_tensors_are(name: str) -> None:
    expected = TAKERS[name](MODEL, (X, Y))
    for form, make in FORMS.items():
        assert TAKERS[name](MODEL, make()) == expected, form


def test_a_diagnosis_takes_a_loader() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    x = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    y = net(x).argmax(1)
    found = diagnose(net, DataLoader(TensorDataset(x, y)), eps=0.1)
    assert {check.name: check.figure for check in found.checks}["clean"] == 1


def test_a_loader_that_shuffles_is_read_once() -> None:
    """Each label stays with its image."""
    reads: list[int] = []

    class Noted(Dataset[Any]):
        def __len__(self) -> int:
            return len(X)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            reads.append(index)
            return X[index], int(Y[index])

    images, labels = as_tensors(DataLoader(Noted(), batch_size=3, shuffle=True), None)
    assert sorted(reads) == list(range(len(X)))
    assert torch.equal(images, X[reads])
    assert torch.equal(labels, Y[reads])


def loader(data: Any) -> Any:
    return DataLoader(data)


class Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand_like(X[index]), int(Y[index])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: loader([{"image": x, "label": 0} for x in X]), ValueError, r"a dict of image, label: expected pairs"),
        (lambda: DataLoader(TensorDataset(X)), ValueError, "images without labels: expected pairs"),
        (lambda: loader(X), ValueError, "images without labels: expected pairs"),
        (lambda: TensorDataset(X), ValueError, "images without labels: expected pairs"),
        (lambda: X, TypeError, "images without labels: pass both, a Dataset, or a DataLoader"),
        (lambda: Augmented(), ValueError, "another image each time"),
        (lambda: TensorDataset(X, Y + 4), ValueError, "but the model scores 4 classes"),
        (lambda: TensorDataset(X[:0], Y[:0]), ValueError, "is empty"),
        (lambda: "images.npz", TypeError, r"expected a pair \(images, labels\), a Dataset, or a DataLoader"),
    ],
)
def test_what_holds_no_images_and_labels(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    for take in TAKERS.values():
        with pytest.raises(error, match=message):
            take(MODEL, make())


# -- attacks


@pytest.mark.parametrize(
    ("attacks", "kind"),
    [([MORA(MODEL)], "MORA"), ([MORA], "MORA"), (MORA, "MORA"), (["mora", MORA(MODEL)], "MORA"), ([3], "int"), (3, "int")],
)
def test_attacks_that_are_no_names_are_told(attacks: Any, kind: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"attacks holds {kind}, no name: .*AutoAttack\(attacks_to_run=\[...\]\)"):
        evaluate(MODEL, (X, Y), eps=EPS, attacks=attacks, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("attacks", ["torchattacks:FGSM", ("torchattacks:FGSM",)])
def test_attacks_by_their_names(attacks: Any, tmp_path: Path) -> None:
    found = evaluate(MODEL, TensorDataset(X, Y), eps=np.float32(EPS), attacks=attacks, out=tmp_path / "run", n=np.int64(4))
    assert [row["attack"] for row in found.rows] == ["clean", "torchattacks:FGSM", "worst case"]


# -- AutoAttack


def test_a_state_s_path_that_is_a_folder(tmp_path: Path) -> None:
    eps: Any = np.float32(EPS)
    adversary = AutoAttack(MODEL, eps=eps, seed=0, verbose=False, attacks_to_run=["torchattacks:FGSM"])
    with pytest.raises(IsADirectoryError, match="is a folder: name a file in it"):
        adversary.run_standard_evaluation(X, Y, state_path=tmp_path)
    whole: Any = adversary.run_standard_evaluation(X, Y, bs=np.int64(8), state_path=tmp_path / "state")  # type: ignore[arg-type]
    again = AutoAttack(MODEL, eps=eps, seed=0, verbose=False, attacks_to_run=["torchattacks:FGSM"])
    assert torch.equal(again.run_standard_evaluation(X, Y, bs=8, state_path=tmp_path / "state"), whole)  # type: ignore[arg-type]


def test_each_attack_by_itself_in_a_box() -> None:
    """What each finds lies in the ball and the box, fools as many as by itself, and is what the labels say."""
    box = Box(-2, 3)
    x = -2 + 5 * X.flatten(1)
    net = nn.Linear(108, 3).eval()
    net.weight.data = torch.randn(3, 108, generator=torch.Generator().manual_seed(0)) / 10
    y = net(x).argmax(1)
    names = ["torchattacks:FGSM", "torchattacks:PGD?steps=5"]
    settings: dict[str, Any] = {"eps": 0.2, "seed": 0, "verbose": False, "box": box}
    found: Any = AutoAttack(net, attacks_to_run=names, **settings).run_standard_evaluation_individual(x, y, 4, True)
    assert list(found) == names
    for name, (images, predicted) in found.items():
        verdict = judge(net, x, y, images, eps=0.2, box=box)
        alone = AutoAttack(net, attacks_to_run=[name], **settings)
        again: Any = alone.run_standard_evaluation(x, y, 4)
        assert torch.equal(again, images)
        assert torch.equal(alone.robust, verdict.robust)
        assert torch.equal(predicted, net(images).argmax(1))
        assert not verdict.robust.all()


def test_an_ensemble_of_rows_in_a_box_takes_a_dataset(tmp_path: Path) -> None:
    net = nn.Linear(5, 2).eval()
    x = 10 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    y = net(x).argmax(1)
    box = Box(-50, 50)
    found = evaluate(Ensemble([net]), TensorDataset(x, y), eps=1, box=box, attacks="torchattacks:FGSM", out=tmp_path / "run")
    assert found.summary["cells"][0]["within"] == "in [-50, 50]"
    assert found.summary["cells"][0]["clean"]["robust"] == 6
