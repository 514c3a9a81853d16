"""What a report argues: in one sentence, with the flags' meaning, over all images, and with how to run it again."""

from __future__ import annotations

import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure
from torch import nn

from benchmarks.leaderboard import COLUMNS, cells_of
from ensemble_attacks.cli.group import main
from ensemble_attacks.diagnostics import Check, Diagnosis
from ensemble_attacks.diagnostics.meanings import MEANINGS, meaning_of, sources_of
from ensemble_attacks.evaluation import manifest as manifests
from ensemble_attacks.evaluation.ledger import Result
from ensemble_attacks.evaluation.report import figures, pages
from ensemble_attacks.evaluation.report.again import as_command, as_toml
from ensemble_attacks.evaluation.report.argument import flags_of, verdict
from ensemble_attacks.evaluation.report.effort import Effort
from ensemble_attacks.evaluation.report.evidence import _passes
from ensemble_attacks.evaluation.report.picture import Picture, drawn_alike
from ensemble_attacks.evaluation.settings import Sweep
from ensemble_attacks.files import whole_folder
from ensemble_attacks.models.structure import Structure

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what matplotlib imports
FLAGS = Path(__file__).parents[2] / "docs" / "flags.md"
STRUCTURE = Structure(True, False, False, False, False, 10)
SWEEPS = [
    Sweep(("gal_convnet_3",), (0.12,), ("mora", "autoattack"), dataset="digits", n=12, shard_size=12),
    Sweep(
        ("a", "b"), (8 / 255, 1e-05), ("mora?steps=50&betas=0.5",), ("voting", "softmax"), "cifar10", (0, 3), 500, 250, True
    ),
    Sweep(
        ("nets.py:make?a='\"\\",), (0.1,), ("pgd",), dataset="a b\n\x7f\u2028🐢.npz", n=4, shard_size=4, norm="L2", draws=3
    ),
    Sweep(
        ("m",),
        (0.5,),
        ("pgd",),
        dataset="d",
        n=9,
        shard_size=3,
        sample=9,
        only_correct=True,
        transform="resize=256,crop=224",
    ),
]


def manifest_of(sweep: Sweep) -> dict[str, Any]:
    listed = sweep.listed()
    return {"sweep": {key: list(value) if isinstance(value, tuple) else value for key, value in listed.items()}}


def asked_for(sweep: Sweep) -> dict[str, Any]:
    """What a sweep's file says of it: what is drawn says how many there are, and one range needs no size."""
    n = None if sweep.sample else sweep.n
    return replace(sweep, n=n, shard_size=250 if sweep.shard_size == sweep.n else sweep.shard_size).listed()


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_file_is_read_as_the_run_that_it_is_of(sweep: Sweep, tmp_path: Path) -> None:
    text = as_toml(manifest_of(sweep))
    tomllib.loads(text)
    (tmp_path / "sweep.toml").write_text(text)
    assert Sweep.read(tmp_path / "sweep.toml").listed() == asked_for(sweep)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_command_asks_for_the_run_that_it_is_of(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sweep] = []

    def stop(sweep: Sweep, **places: Any) -> None:
        asked.append(sweep)
        raise ValueError("as far as here")

    monkeypatch.setattr(manifests, "manifest_of", stop)
    program, *words = shlex.split(as_command(manifest_of(sweep)))
    assert program == "ensemble-attacks"
    if len(sweep.models) > 1:
        assert words == ["sweep", "sweep.toml"]
        return
    CliRunner().invoke(main, words)
    assert [found.listed() for found in asked] == [asked_for(sweep)]


def test_flags_mean_what_the_docs_say() -> None:
    rows = [line.strip("|").split(" | ") for line in FLAGS.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(MEANINGS)
    for (names, seen, remedy), meaning in zip(rows, MEANINGS, strict=True):
        assert tuple(re.findall(r"`(\w+)`", names)) == meaning.flags
        assert (seen.strip(), remedy.strip()) == (meaning.seen, meaning.remedy)
    assert meaning_of("nothing of ours") is None


def test_sources_are_linked() -> None:
    pieces = list(sources_of(Check("unbounded", "flag", 1.0, 0.1, "said", source="[C19], [P22] I6")))
    assert [text for text, _ in pieces] == ["Carlini et al., 2019", ", ", "Pintor et al., NeurIPS 2022", " I6"]
    assert [bool(address) for _, address in pieces] == [True, False, True, False]
    assert list(sources_of(Check("x", "flag", 1.0, 0.1, "said", source="arXiv:2411.14834"))) == [
        ("arXiv:2411.14834", "https://arxiv.org/abs/2411.14834")
    ]


def row(robust: int, n: int = 10, **more: Any) -> dict[str, Any]:
    return {"n": n, "robust": robust, "accuracy": robust / n, "interval": [0.0, 1.0], **more}


def test_the_verdict_in_a_sentence() -> None:
    attacks = {"autoattack": row(4), "mora": row(1, disagreement=2)}
    cell = {"n": 10, "cascade": False, "attacks": attacks, "worst_case": row(1)}
    said = verdict(cell, None)
    assert said.startswith("AutoAttack's standard suite says 40.0%, the worst case is 10.0% (")
    assert "the strongest attack, mora, leaves 10.0%; the model told the judge otherwise than the attack on 2 images" in said
    assert said.endswith("was not looked into.")
    flag = Check("transfer_gap", "flag", 0.5, 0.1, "said")
    diagnosis = Diagnosis(STRUCTURE, [flag, Check("clean", "note", 1.0, None, "said")])
    assert verdict(cell, diagnosis).endswith("; flags: transfer_gap.")
    assert [found["check"] for found in flags_of(diagnosis)] == [flag]
    assert "no standard suite" in verdict(cell | {"attacks": {"mora": row(1), "autoattack": row(0)}, "cascade": True}, None)
    assert verdict({"n": 10, "cascade": False, "attacks": {}}, None) == "Nothing was found: all attacks were given up."


def test_passes_of_an_image_end_with_the_part_that_fooled_it() -> None:
    tensors = {"rows": torch.arange(4), "stage a": torch.tensor([0, 1, 1, 1]), "stage b": torch.tensor([0, 0, 1, 1])}
    info = {"forwards": 60, "backwards": 20, "stages": {"a": [6, 2], "b": [30, 10]}}
    assert _passes(Result(tensors, info)).tolist() == [2.0, 10.0, 20.0, 20.0]


def test_what_takes_too_long_is_left_out() -> None:
    def effort(size: int) -> Effort:
        net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))
        settings = SimpleNamespace(seed=0, eot_iter=None)
        return Effort.of(SimpleNamespace(model=net, x=torch.zeros(1, 3, size, size), settings=settings))  # type: ignore[arg-type]

    assert (effort(32).diagnosed, effort(32).alone, effort(32).left_out) == (32, 8, "")
    assert effort(224).diagnosed == 16
    assert effort(2000).left_out == "the checks, the transfer between members, the surface of the margin"


def test_a_drawing_is_the_same_again_and_runs_nothing() -> None:
    def drawn() -> bytes:
        axes = (figure := Figure(figsize=(2, 1))).subplots()
        axes.barh([0], [1])
        axes.set(yticks=[0], yticklabels=["</text><script>alert(1)</script>$x$"])
        return Picture("bars", "a caption", figure).svg()

    with drawn_alike():
        first, second = drawn(), drawn()
    assert first == second
    assert b"prefers-color-scheme: dark" in first
    assert b"<script" not in first


def test_the_page_escapes_what_others_chose() -> None:
    bad = "</pre><script>alert('x')</script>`<b>`"
    flag = Check("scale", "flag", 0.5, 0.1, bad, source=bad)
    diagnosis = Diagnosis(STRUCTURE, [flag, replace(flag, verdict="ok")], [bad])
    section = pages.Section(
        0, bad, bad, (bad,) * len(pages.OVERVIEW), [], diagnosis, [(0, 1, bad, 2.0, 3, bad)], 3, bad, flags_of(diagnosis)
    )
    given: dict[str, Any] = dict(
        columns=(bad,), rows=[(bad,)], absent=[bad], lead=bad, overview=pages.OVERVIEW, shared=[], evidence=(bad,)
    )
    given |= dict(most=1, command=bad, toml=bad, record=bad, title=bad)
    for sections in ([section], [section, section]):
        page = pages.render_page(pages.TEMPLATES / "report.html.jinja", sections=sections, **given)
        assert "alert('x')" not in page
        assert page.count("<script>") == 1
        assert "<b>" not in page


def test_a_folder_is_there_entirely_or_not_at_all(tmp_path: Path) -> None:
    def write(fails: bool) -> None:
        with whole_folder(tmp_path / "new" / "report") as folder:
            (folder / "a").mkdir()
            (folder / "a" / "b.txt").write_text("x")
            if fails:
                assert not (tmp_path / "new" / "report").exists()
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write(fails=True)
    assert not list((tmp_path / "new").iterdir())
    write(fails=False)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report"]
    with pytest.raises(FileExistsError):
        write(fails=False)
    assert (tmp_path / "new" / "report" / "a" / "b.txt").read_text() == "x"


def test_a_curve_of_the_parts_of_a_suite() -> None:
    parts = {"a": {"robust": 8, "forwards_per_image": 2.0, "backwards_per_image": 1.0}}
    assert figures._parts(row(5, stages=parts)) == [(3.0, 80.0)]
    assert figures._parts(row(5)) == []


def test_a_row_of_the_leaderboard(tmp_path: Path) -> None:
    found = {"dataset": "digits", "defense": "gal_convnet_3", "vote": "voting", "eps": 0.12, "n": 100, "clean": 97.0}
    found |= {"AutoAttack": 30.0, "best known": 3.0, "low": 1.0, "high": 8.5, "found by": "mora-mt", "flags": None}
    board = tmp_path / "leaderboard"
    records = board / "digits" / "gal_convnet_3_voting_0.12_seed0"
    (records / "report").mkdir(parents=True)
    (records / "report" / "report.html").touch()
    shown = dict(zip(COLUMNS, cells_of(found, board), strict=True))
    assert shown["gap"] == {"text": "27.0", "bar": 27.0}
    assert (shown["standard suite"], shown["best plain surrogate"], shown["flags"]) == (30.0, "", "")
    assert shown["95% interval"] == "1.0 to 8.5"
    assert shown["links"]["links"] == [
        ("paper", "https://arxiv.org/abs/1901.09981"),
        ("records", "digits/gal_convnet_3_voting_0.12_seed0"),
        ("report", "digits/gal_convnet_3_voting_0.12_seed0/report/report.html"),
    ]
