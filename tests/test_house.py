"""The house: what stands where, and how many places an errand touches."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ensemble_attacks
from ensemble_attacks import APGD, MORA, Ensemble, data, judge
from ensemble_attacks.attacks import registry
from ensemble_attacks.attacks.record import PAPERS, NamedAttack
from ensemble_attacks.attacks.registry import RECORDS
from ensemble_attacks.cli.catalogue import page as attacks_page
from ensemble_attacks.cli.group import COMMANDS, main
from ensemble_attacks.data import Dataset, load_dataset
from ensemble_attacks.descent.balls import Ball
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.suite import Settings, attack_names
from ensemble_attacks.models.votes import VOTES, Vote
from ensemble_attacks.norms import NORMS, Box, Norm
from tests.helpers import make_ensemble

ROOT = Path(__file__).parents[1]
PACKAGES = ("ensemble_attacks", "defenses")


@pytest.mark.parametrize(
    ("door", "names"),
    [
        ("ensemble_attacks", ensemble_attacks.__all__),
        ("ensemble_attacks.autoattack", ["AutoAttack", "Flag", "State"]),
        ("ensemble_attacks.robustbench", ["benchmark", "ensure", "pipeline"]),
        ("ensemble_attacks.base", ["CarefulAttack", "DescentAttack"]),
        ("ensemble_attacks.descent", ["Stage", "Trace", "Outputs"]),
        ("ensemble_attacks.steps", ["CosineSteps", "StepRule"]),
        ("ensemble_attacks.votes", ["Vote", "weighted", "abstaining", "gated", "ecoc", "smoothed"]),
        ("ensemble_attacks.registry", ["NamedAttack", "find_attack", "registered"]),
        ("ensemble_attacks.data", ["load_dataset"]),
        ("ensemble_attacks.diagnostics", ["diagnose", "indicators", "binarization"]),
        ("ensemble_attacks.evaluation.ledger", ["Ledger"]),
        ("ensemble_attacks.evaluation.runner", ["evaluate"]),
        ("ensemble_attacks.evaluation.sweep", ["Sweep", "manifest_of", "summarise", "verify"]),
        ("defenses", ["load_model", "list_models", "train_model", "convert", "register_with_robustbench"]),
        ("defenses.zoo", ["load_model", "list_models"]),
    ],
)
def test_documented_doors_are_where_they_were(door: str, names: list[str]) -> None:
    module = importlib.import_module(door)
    assert not [name for name in names if not hasattr(module, name)]


@pytest.mark.parametrize(
    "code", ["import ensemble_attacks", "from ensemble_attacks.cli import main; main(['--help'], standalone_mode=False)"]
)
def test_torch_is_imported_when_it_is_needed(code: str) -> None:
    command = [sys.executable, "-c", f"import sys\n{code}\nsys.exit('torch' in sys.modules)"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_the_package_says_of_every_name_where_it_lives() -> None:
    """To type checkers, too, which see the imports that are not run."""
    tree = ast.parse((ROOT / "ensemble_attacks" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: f"{node.module}".removeprefix("ensemble_attacks.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == ensemble_attacks._HOMES


def test_the_help_says_what_the_commands_say() -> None:
    for name, (_, meaning) in COMMANDS.items():
        command = main.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        assert command.get_short_help_str(200).startswith(meaning.rstrip(".").split(":")[0][:20])


def test_models_are_asked_at_the_door_alone() -> None:
    """No other module calls a model: what goes in, and what comes back, is `ask`'s affair."""
    called = {"model", "net", "target", "original", "member", "twin", "surrogate"}
    found = []
    for path in (ROOT / "ensemble_attacks").rglob("*.py"):
        where = path.relative_to(ROOT).as_posix()
        if where == "ensemble_attacks/models/ask.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            attribute = node.func if isinstance(node.func, ast.Attribute) else None
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            if attribute is not None and is_own(attribute):
                name = attribute.attr
            member = attribute is not None and attribute.attr == "member_logits"
            if name in called or (member and not is_super(node.func)):
                found.append(f"{where}:{node.lineno}")
    allowed = {  # what a model is made of calls its parts
        "ensemble_attacks/models/ensembles.py",
        "ensemble_attacks/models/surrogates.py",
        "ensemble_attacks/models/passes.py",
        "ensemble_attacks/models/twins.py",
    }
    assert not [place for place in found if place.split(":")[0] not in allowed]


def test_where_a_model_lies_is_asked_at_the_door_alone() -> None:
    """Its first parameter is found in one place, which also looks at buffers (`device_of`, `beside`, `precision`)."""
    sought = "import torch\nnext(net.parameters(), x).device\nlist(net.buffers())[0].device"
    assert [line for line, _ in firsts_of(ast.parse(sought))] == [2, 3]
    found = [
        f"{path.relative_to(ROOT).as_posix()}:{line}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for line, what in firsts_of(ast.parse(path.read_text()))
    ]
    assert not [place for place in found if not place.startswith("ensemble_attacks/models/ask.py")]


def firsts_of(tree: ast.AST) -> list[tuple[int, str]]:
    """Where code takes one of a model's parameters or buffers, by ``next`` or its number."""
    ways = [
        (node.args[0] if isinstance(node, ast.Call) else node.value, node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "next" and node.args)
    ]
    return [
        (node.lineno, part.func.attr)
        for whole, node in ways
        for part in ast.walk(whole)
        if isinstance(part, ast.Call)
        and isinstance(part.func, ast.Attribute)
        and part.func.attr in ("parameters", "buffers")
    ]


def is_own(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "self"


def is_super(function: ast.expr) -> bool:
    value = function.value if isinstance(function, ast.Attribute) else None
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super"


def test_a_vote_from_outside_touches_one_place(monkeypatch: pytest.MonkeyPatch, batch: tuple[Tensor, Tensor]) -> None:
    monkeypatch.setitem(VOTES, "median", Vote("median", lambda logits_MNK: logits_MNK.median(0).values))
    images, _ = batch
    model = Ensemble(list(make_ensemble().members), vote="median").eval()
    labels = model(images).argmax(1)
    assert not judge(model, images, labels, MORA(model, eps=0.2, steps=10)(images, labels), eps=0.2).robust.all()
    attacks = {"mora": 1.0, "auto": 1.0}
    summary = evaluate(model.float(), images.float()[:8], labels[:8], list(attacks), Settings(0.2))
    assert all(summary["attacks"][name]["accuracy"] < highest for name, highest in attacks.items())


def test_a_box_from_outside_touches_one_place(batch: tuple[Tensor, Tensor]) -> None:
    """Images in [-1, 1]: the attack's and the judge's box; the result is that of the same images in [0, 1]."""
    images, labels = batch
    box = Box(-1, 1)

    class Centred(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return make_ensemble()((x + 1) / 2)

    attack, same = APGD(Centred().eval(), eps=0.1, steps=10), APGD(make_ensemble(), eps=0.05, steps=10)
    attack.box = box
    moved = attack(2 * images - 1, labels)
    assert moved.min() < 0
    torch.testing.assert_close((moved + 1) / 2, same(images, labels), rtol=0, atol=1e-6)
    assert judge(Centred().eval(), 2 * images - 1, labels, moved, eps=0.1, box=box).accuracy < 1


def test_a_norm_from_outside_touches_one_place(monkeypatch: pytest.MonkeyPatch, batch: tuple[Tensor, Tensor]) -> None:
    """L3, by its order, dual and ball."""
    images, labels = batch
    monkeypatch.setitem(NORMS, "L3", Norm("L3", order=3, dual=1.5))
    monkeypatch.setattr(Ball, "known", dict(Ball.known))

    class L3Ball(Ball, norm="L3"):
        def project(self, x: Tensor) -> Tensor:
            delta = x - self.clean
            size = NORMS["L3"].size(delta).view(-1, 1, 1, 1)
            return self.box.clamp(self.clean + delta * (self.eps * (1 - 1e-6) / size.clamp_min(self.eps)))

        def steepest(self, gradient: Tensor) -> Tensor:
            direction = gradient.sign() * gradient.abs().sqrt()
            return direction / NORMS["L3"].size(direction).clamp_min(1e-12).view(-1, 1, 1, 1)

        def start(self, noise: Tensor) -> Tensor:
            return self.project(self.clean + self.eps * self.steepest(noise))

    model = make_ensemble()
    moved = APGD(model, norm="L3", eps=0.5, steps=20)(images, labels)
    assert judge(model, images, labels, moved, eps=0.5, norm="L3").accuracy < 1


def test_an_attack_from_outside_touches_one_place(monkeypatch: pytest.MonkeyPatch, batch: tuple[Tensor, Tensor]) -> None:
    known = registry.registered()
    record = NamedAttack("a short APGD", registry._ours("apgd.APGD", steps=3), cost=6)
    monkeypatch.setattr(registry, "registered", lambda: known | {"short": record})
    images, labels = (t[:8] for t in batch)
    assert "short" in evaluate(make_ensemble(), images, labels, ["short"], Settings(0.1))["attacks"]


def test_a_dataset_from_outside_touches_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.randint(0, 8, (5, 2, 3, 4)), torch.arange(5) % 2
    monkeypatch.setitem(data.DATASETS, "tiny", Dataset(lambda *_: (images, labels), 7, 2, (2, 3, 4), 5))
    x, y = load_dataset("tiny", n=3, first=1)
    assert torch.equal(x * 7, images[1:4].float())
    assert torch.equal(y, labels[1:4])


def test_every_attack_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "attacks.md").read_text()
    assert page == attacks_page(), "write it anew: ensemble-attacks attacks --markdown > docs/attacks.md"
    named = set(re.findall(r"^\| `([a-z0-9-]+)`", page, re.M))
    assert set(attack_names()) & set(RECORDS) <= named
    assert {record.source for record in RECORDS.values()} - {""} == set(PAPERS)
