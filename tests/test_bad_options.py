"""Bad options, generated over all commands: each is told in a line, before any work, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from ensemble_attacks.cli.group import main

WHOLE = ("x", "1.5", "nan", "-1", "9" * 401, "", "1e3", "0x10")
REAL = ("x", "nan", "inf", "-0.1", "0", "9" * 401, "1e999999", "")
NAMED = ("", "x", "\x1b[31mred", "[red]x[/red]", "../../etc/passwd", "x" * 5000, "é\u202e")
FILES = ("", "/dev/null", "/proc/nothing", "/dev/full/x")
EVALUATE = ("evaluate", "--model", "gal_convnet_3", "--eps", "0.1", "--n", "2", "--attacks", "torchattacks:FGSM")
DIAGNOSE = ("diagnose", "--model", "gal_convnet_3", "--eps", "0.1", "--n", "8")
TRAIN = ("train", "standard", "--epochs", "1")
OPTIONS: dict[tuple[str, ...], dict[str, tuple[str, ...]]] = {
    EVALUATE: {
        **dict.fromkeys(("--n", "--batch-size", "--shard-size", "--seed", "--draws", "--eot-iter", "--workers"), WHOLE),
        "--eps": REAL,
        **dict.fromkeys(("--model", "--vote", "--dataset", "--norm", "--attacks", "--engine"), NAMED),
        "--device": ("meta", "", "x", "cuda:99", "cpu,meta"),
        "--out": FILES,
        "-O": ("x", "x=1", "=", ""),
    },
    DIAGNOSE: {
        **dict.fromkeys(("--n", "--seed"), WHOLE),
        "--eps": REAL,
        **dict.fromkeys(("--model", "--vote", "--dataset", "--attack"), NAMED),
        "--device": ("meta", "", "x", "cuda:99"),
        "--json": ("/tmp", "/proc/nothing/x", ""),
    },
    TRAIN: {
        **dict.fromkeys(("--members", "--epochs", "--batch-size", "--seed"), WHOLE),
        "--device": ("meta", "", "x"),
        "--dataset": NAMED,
        "--architecture": NAMED,
    },
    ("verify", "/nowhere"): {"--recraft": WHOLE[:5], "--seed": WHOLE[:4], "--device": ("meta", "")},
    ("status",): {"": (*FILES, "/tmp")},
    ("resume",): {"": (*FILES, "/tmp")},
    ("report",): {"": (*FILES, "/tmp")},
    ("sweep",): {"": (*FILES, "/tmp")},
}


@pytest.mark.slow
def test_bad_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tried, wrong = 0, []
    for command, options in OPTIONS.items():
        cases = [(option, value) for option, values in options.items() for value in values]
        for option, value in cases:
            out = () if command[0] not in ("evaluate", "train") or option == "--out" else ("--out", str(tmp_path / "out"))
            result = CliRunner().invoke(main, [*command, *out, *([option] if option else []), value])
            tried += 1
            sound = result.exit_code == 2 and (result.exception is None or isinstance(result.exception, SystemExit))
            if not sound or "\x1b" in result.output or "Traceback" in result.output or list(tmp_path.iterdir()):
                told = f"{result.exit_code} {result.exception!r:.200} {result.output[-200:]}"
                wrong.append(f"{command[0]} {option} {value[:20]!r}: {told}")
                for path in tmp_path.iterdir():
                    path.rename(tmp_path.parent / f"left-{tried}")
    print(f"{tried} bad options")  # noqa: T201
    assert not wrong, "\n".join(wrong)


def test_no_dataset_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty name is the path of a folder, which may hold folders with pictures."""
    (folder := tmp_path / "docs").mkdir()
    Image.new("L", (8, 8)).save(folder / "picture.png")
    monkeypatch.chdir(tmp_path)
    for command, told in (
        (EVALUATE, "the dataset has no name"),
        (TRAIN, "unknown dataset '': known: cifar10, cifar100, digits"),
    ):
        result = CliRunner().invoke(main, [*command, "--out", "out", "--dataset", ""])
        assert (result.exit_code, type(result.exception)) == (2, SystemExit)
        assert told in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]
