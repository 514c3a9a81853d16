"""What a call needs beyond the images, and those that it returns, grows with ``batch_size``: peaks of memory, not times."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest

from tests.helpers import slow_but

MEASURE = """
import os, resource, sys, torch
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
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, call in CALLS.items():
    if name in sys.argv and os.fork() == 0:  # each in a process of its own, whose peak begins with what it was given
        exec(call, {**globals(), "n": 8})
        before = peak()
        exec(call, {**globals(), "n": len(x)})
        print(name, (peak() - before) * 1024 / x.nbytes, flush=True)
        os._exit(0)
    elif name in sys.argv:
        assert os.wait()[1] == 0
"""
CALLS = {
    "judge": "judge(model, x[:n], y[:n], x[:n], eps=0.1, batch_size=4)",
    "apgd": "APGD(model, eps=1e-6, steps=1, batch_size=4)(x[:n], y[:n])",
    "mora": "MORA(model, eps=1e-6, steps=1, betas=(0.5,), batch_size=4)(x[:n], y[:n])",
    "targeted": "a = APGD(model, eps=1e-6, steps=1, batch_size=4); a.set_mode_targeted_random(quiet=True); a(x[:n], y[:n])",
    "start": "MORA(model, eps=1e-6, steps=1, betas=(0.5,), batch_size=4)(x[:n], y[:n], x[:n])",
}


QUICK = ("judge", "mora")


@cache
def growth(names: tuple[str, ...]) -> dict[str, float]:
    """Return by how much each call's peak grows, in sizes of the images."""
    code = f"CALLS = {CALLS}\n{MEASURE}"
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    return {name: float(size) for name, size in map(str.split, done.stdout.splitlines())}


@pytest.mark.parametrize("name", slow_but(QUICK, CALLS))
def test_memory_follows_batch_size(name: str) -> None:
    """At most once more the images, which an attack returns, and half of them for the allocator's sake."""
    together = QUICK if name in QUICK else tuple(set(CALLS) - set(QUICK))
    assert growth(together)[name] < (0.5 if name == "judge" else 1.5)
