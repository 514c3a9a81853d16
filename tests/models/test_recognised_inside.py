"""A network that answers with the rows of its members is recognised behind what others put before it."""

import pytest
import torch
from torch import Tensor, nn

from ensemble_attacks import as_ensemble
from tests.helpers import make_member


class StochasticModel(nn.Module):
    """Its class's name, and how many answers it gives, are torch-uncertainty's."""

    def __init__(self, number: int = 3) -> None:
        super().__init__()
        self.num_samples = number
        self.core_model = make_member()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([(1 + sample) * self.core_model(x) for sample in range(self.num_samples)])


@pytest.mark.parametrize("wrapped", [lambda net: net, lambda net: nn.Sequential(nn.Identity(), net)])
def test_rows_of_samples(wrapped: type) -> None:
    x = torch.rand(4, 3, 6, 6)
    model = wrapped(StochasticModel()).eval()
    ensemble = as_ensemble(model)
    assert "num_samples" in str(ensemble.found)
    assert torch.allclose(ensemble(x), model(x).unflatten(0, (3, 4)).softmax(-1).mean(0).log(), atol=1e-5)
