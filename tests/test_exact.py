"""The mixed-integer programmes of `benchmarks.exact`, against a fine grid of the whole ball."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.exact import FOOLED, LOGITS, ROBUST, SOFTMAX, VOTING, Array, Image
from benchmarks.milp import Net
from ensemble_attacks import Ensemble

EPS = 0.2
RECORDS = Path(__file__).parents[1] / "benchmarks/results/truth"


def members(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    nets = nn.ModuleList(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)) for _ in range(3)).double()
    for parameter in nets.parameters():
        parameter.data *= 3
    return list(nets.requires_grad_(False).eval())


@pytest.mark.parametrize("seed", range(6))
def test_answers_are_those_of_the_whole_ball(seed: int) -> None:
    nets = members(seed)
    x_D = torch.rand(2, dtype=torch.double)
    label = int(Ensemble(nets, LOGITS)(x_D.unsqueeze(0)).argmax())
    axes = [torch.linspace(max(float(v) - EPS, 0), min(float(v) + EPS, 1), 60).double() for v in x_D]
    grid = torch.tensor(list(product(*(axis.tolist() for axis in axes))), dtype=torch.double)
    ensembles = {vote: Ensemble(nets, vote) for vote in (LOGITS, VOTING, SOFTMAX)}

    def fools(vote: str, point_D: Array) -> bool:
        point = torch.from_numpy(point_D)
        assert ((point - x_D).abs() <= EPS + 1e-12).all()
        assert ((point >= 0) & (point <= 1)).all()
        return int(ensembles[vote](point.unsqueeze(0)).argmax()) != label

    found = Image([Net.of(net) for net in nets], x_D.numpy(), label, EPS, fools).settle()
    for vote, ensemble in ensembles.items():
        fooled = bool((ensemble(grid).argmax(1) != label).any())
        assert found[vote] != ROBUST or not fooled
        assert found[vote] != FOOLED or fooled or vote != LOGITS  # what the grid misses is small
    assert found[LOGITS] in (ROBUST, FOOLED)
    worst = torch.stack([net(grid).argmax(1) != label for net in nets]).sum(0).amax()
    fewest, most = found["fooled members"]
    assert int(worst) <= most
    assert fewest <= most


def test_a_net_computes_what_its_module_does() -> None:
    net = members(0)[0]
    x_D = torch.rand(2, dtype=torch.double)
    np.testing.assert_allclose(Net.of(net).logits(x_D.numpy()), net(x_D).numpy())


def test_no_stored_attack_beats_a_stored_proof() -> None:
    folders = sorted(path.parent for path in RECORDS.glob("*/exact.json"))
    assert folders
    for folder in folders:
        images = json.loads((folder / "exact.json").read_text())["images"]
        for path in sorted(folder.glob("*_*.json")):
            record = json.loads(path.read_text())
            for image, flag in zip(images, record["flags"], strict=False):
                assert flag == "1" or image[record["vote"]] != ROBUST, (path, image["image"])
            for image, count in zip(images, record["fooled members"], strict=False):
                assert int(count) <= image["fooled members"][1], (path, image["image"])
