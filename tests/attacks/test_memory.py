"""What a call needs beyond the images, and those that it returns, grows with ``batch_size``: peaks of memory, not times."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers import slow_but

MEASURE = """
import resource, torch
from torch import nn
from ensemble_attacks import APGD, MORA, Ensemble, judge
torch.set_num_threads(1)
class Means(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 10)
    def forward(self, x):
        return self.head(x.mean((2, 3)))
torch.manual_seed(0)
model = Ensemble([Means(), Means()], vote="logits").eval()
x = torch.rand(200, 3, 224, 224)
y = model(x).argmax(1)
def call(n):
    {call}
call(8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(len(x))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / x.nbytes)
"""
CALLS = {
    "judge": "judge(model, x[:n], y[:n], x[:n], eps=0.1, batch_size=4)",
    "apgd": "APGD(model, eps=1e-6, steps=1, batch_size=4)(x[:n], y[:n])",
    "mora": "MORA(model, eps=1e-6, steps=1, betas=(0.5,), batch_size=4)(x[:n], y[:n])",
    "targeted": "a = APGD(model, eps=1e-6, steps=1, batch_size=4); a.set_mode_targeted_random(quiet=True); a(x[:n], y[:n])",
    "start": "MORA(model, eps=1e-6, steps=1, betas=(0.5,), batch_size=4)(x[:n], y[:n], x[:n])",
}


@pytest.mark.parametrize("name", slow_but(["judge", "mora"], CALLS))
def test_memory_follows_batch_size(name: str) -> None:
    """At most once more the images, which an attack returns, and half of them for the allocator's sake."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.replace("{call}", CALLS[name])], capture_output=True, text=True, check=True
    )
    assert float(done.stdout.split()[-1]) < (0.5 if name == "judge" else 1.5)
