"""Recorded and compiled passes: the same answers, chosen where they are measured to be faster, else what was there before.

CUDA graphs are simulated: a recording is a list of operations, which a replay does again in the same memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ensemble_attacks import APGD, MORA, Ensemble
from ensemble_attacks.cli import main
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.settings import Settings, Sweep
from ensemble_attacks.evaluation.units import chain_of
from ensemble_attacks.models import replayed, tuning
from ensemble_attacks.models.replayed import Padded, compile_for, padded, record
from ensemble_attacks.models.tuning import Way, best_of, gradient_pass, quickest, ways_to_pass
from tests.evaluation.test_ledger import ledger_in
from tests.helpers import make_ensemble


class Graph(TorchDispatchMode):
    """A recording of operations. Its replay leaves nothing of what the one whose memory it shares has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []
        self.shared: Graph | None = None

    def pool(self) -> Graph:
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.done:
            again = func(*args, **kwargs)
            for new, old in zip(*(one if isinstance(one, (tuple, list)) else (one,) for one in (again, out)), strict=True):
                if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
                    old.detach().copy_(new)
        for func, _, _, out in () if self.shared is None else self.shared.done:
            if isinstance(out, Tensor) and out.is_floating_point() and not any(a.alias_info for a in func._schema.returns):
                out.detach().fill_(torch.nan)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


@contextmanager
def recording(graph: Graph, pool: Graph | None = None) -> Iterator[None]:
    graph.shared = pool
    with graph:
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have CUDA graphs on the CPU."""
    for name, fake in {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph, "graph": recording}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    for module in (replayed, tuning):
        monkeypatch.setattr(module, "can_record", lambda x: True)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(12, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def ensemble(vote: str = "softmax") -> Ensemble:
    return make_ensemble(vote).float()


def calls(net: Padded) -> list[int]:
    """The numbers of images that go to prepared passes from now on."""
    seen: list[int] = []

    def noting(answer: Any) -> Any:
        def noted(x: Tensor) -> Tensor:
            seen.append(len(x))
            return answer(x)

        return noted

    net.passes = {size: noting(answer) for size, answer in net.passes.items()}
    return seen


def check_same(net: nn.Module, model: nn.Module, x: Tensor) -> None:
    for part, other in zip(gradient_pass(net, x), gradient_pass(model, x), strict=True):
        torch.testing.assert_close(part, other)


@pytest.mark.parametrize("model", [ensemble(), ensemble("logits"), ensemble().members[0]], ids=["softmax", "logits", "one"])
def test_batches_are_padded_to_recordings(model: nn.Module, images: Tensor, graphs: None) -> None:
    net = padded(model, images, record, halvings=2)
    seen = calls(net)
    for count in (12, 7, 6, 3, 1):
        check_same(net, model, images[:count])
    check_same(net, model, torch.cat([images, images]))  # no recording is large enough
    assert seen == [12, 12, 6, 3, 3]
    net.least = 0.6
    for count in (12, 7, 4, 1):  # too small a share of 12, of 6 and of 3 is not padded
        check_same(net, model, images[:count])
    assert seen[5:] == [12, 6]
    with torch.no_grad():
        torch.testing.assert_close(net(images), model(images))
    assert seen[7:] == []


def test_what_a_recording_has_said_stays(images: Tensor, graphs: None) -> None:
    """Also after others were seen, and for a second backward pass."""
    model = ensemble()
    net = padded(model, images, record)
    first, second = (x.clone().requires_grad_() for x in (images, images.flip(0)))
    scores, others = net(first), net(second)
    torch.testing.assert_close(scores, model(first))
    torch.testing.assert_close(others, model(second))
    expected = torch.autograd.grad(model(first)[:, 0].sum(), first)[0]
    for _ in range(2):
        got = torch.autograd.grad(scores[:, 0].sum(), first, retain_graph=True)[0]
        torch.autograd.grad(others[:, 1].sum(), second, retain_graph=True)
        torch.testing.assert_close(got, expected)


def test_attacks_on_recordings_return_the_same(images: Tensor, graphs: None) -> None:
    model = ensemble()
    labels = model(images).argmax(1)
    net = padded(model, images, record, halvings=2)
    seen = calls(net)
    for make in (APGD, MORA):
        of_model, of_net = (make(one, eps=0.05, steps=5)(images, labels) for one in (model, net))
        torch.testing.assert_close(of_model, of_net)
    assert len(seen) > 10
    assert len(set(seen)) > 1


class Waiting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] * float(x.detach().mean())


class OfBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)).flatten(1)[:, :3] * 10


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] + torch.randn(len(x), 3)


@pytest.mark.parametrize(
    ("model", "why"),
    [(Waiting(), "RuntimeError: operation not permitted"), (OfBatch(), "its scores are others"), (Random(), "random")],
    ids=["waits", "of a batch", "random"],
)
def test_what_cannot_be_recorded_is_asked_as_it_is(
    model: nn.Module, why: str, images: Tensor, graphs: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, tuning.__name__)
    model.eval()
    assert quickest(model, images, 5) is model
    (line,) = caplog.messages
    assert "is asked as it is" in line
    ways = {way.name: way for way in ways_to_pass(model, images, 5)}
    assert why in ways[tuning.GRAPHS].why


def test_recordings_are_chosen_where_they_are_faster(
    images: Tensor, graphs: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, tuning.__name__)
    model = ensemble()
    for share, chosen in ((0.3, True), (0.95, False)):
        monkeypatch.setattr(tuning, "seconds", lambda net, x, share=share: share if isinstance(net, Padded) else 1.0)
        net = quickest(model, images, 5)
        assert isinstance(net, Padded) == chosen
        assert ("is asked by CUDA graphs" in caplog.messages[-1]) == chosen
        assert not chosen or getattr(net, "least", None) == share
    assert len(caplog.messages) == 2


class Large(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_where_memory_runs_out_nothing_is_tuned(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, tuning.__name__)
    model = Large().eval()
    assert quickest(model, images, 5) is model
    assert caplog.messages == ["Large is not tuned: memory runs out on 12 images"]
    assert quickest(model, images[:0], 5) is model


def test_compiled_passes_are_the_same(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed, "BACKEND", "eager")
    model = ensemble()
    net = padded(model, images, compile_for)
    for count in (12, 5):
        check_same(net, model, images[:count])


def test_it_is_compiled_only_where_there_are_passes_enough(
    images: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, tuning.__name__)
    monkeypatch.setattr(tuning, "seconds", lambda net, x: 0.5 if isinstance(net, Padded) else 1.0)
    monkeypatch.setattr(tuning, "compile_for", lambda asked, x: asked)
    model = ensemble()
    assert quickest(model, images, 10) is model
    assert isinstance(quickest(model, images, 1000), Padded)
    assert "compiled: that takes minutes, the passes 10 s" in caplog.messages[0]

    def broken(asked: Any, x: Tensor) -> Any:
        raise RuntimeError("no compiler is found")

    monkeypatch.setattr(tuning, "compile_for", broken)
    assert quickest(model, images, 1000) is model
    assert "no compiler is found" in caplog.messages[2]


def test_what_it_takes_once_is_weighed() -> None:
    plain, recorded, compiled = Way("a", None, 0, 1.0), Way("b", None, 2, 0.7), Way("c", None, 100, 0.2)
    cannot = Way("d", why="it is random")
    best = {passes: best_of([plain, cannot, recorded, compiled], passes).name for passes in (0, 1, 7, 50, 1000)}
    assert best == {0: "a", 1: "a", 7: "a", 50: "b", 1000: "c"}


def test_a_tuned_evaluation_finds_the_same(images: Tensor, graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "seconds", lambda net, x: 0.5 if isinstance(net, Padded) else 1.0)
    model = ensemble()
    labels = model(images).argmax(1)
    tuned, plain = (evaluate(model, images, labels, ["mora"], Settings(0.1, tune=tune)) for tune in (True, False))
    assert tuned["attacks"] == plain["attacks"]


def test_a_sweep_says_so_where_it_is_tuned() -> None:
    plain = Sweep(models=("a",), eps=(0.1,), attacks=("mora",))
    assert "tune" not in plain.listed()
    assert replace(plain, tune=True).listed()["tune"] is True


def test_a_run_is_tuned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, tuning.__name__)
    asked: dict[str, Any] = dict(attacks=("ea-apgd-ce?steps=2",), n=4, shard_size=4)
    ledger, plain = (ledger_in(tmp_path / name, **asked, **more) for name, more in (("run", {"tune": True}), ("plain", {})))
    run(ledger)
    assert "is asked as it is" in caplog.text
    own, others = (chain_of(one.manifest, 0) for one in (ledger, plain))
    assert [unit.content["tune"] for unit in own] == [True, True]
    assert all("tune" not in unit.content for unit in others)
    assert {unit.identity for unit in own}.isdisjoint(unit.identity for unit in others)


def test_the_command_weighs_all_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "compile_for", lambda asked, x: asked)
    monkeypatch.setenv("COLUMNS", "160")
    done = CliRunner().invoke(main, ["tune", "--model", "gal_convnet_3", "--n", "8", "--attacks", "apgd-ce"])
    assert done.exit_code == 0, done.output
    for said in (
        "as it is",
        "folded",
        "in bfloat16",
        "there are none on cpu",
        "--tune",
        "Of 100 passes (8 images, apgd-ce)",
    ):
        assert said in done.output
