"""The package beside what else may be installed: `make test-hosts`.

Each environment is a folder of links to this one's packages, some left out or put in, seen by a fresh interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.hosts
SITE = Path(sysconfig.get_paths()["purelib"])
PROJECT = Path(__file__).parents[2]
LOAD = "from ensemble_attacks.robustbench import ensure; print(ensure().benchmark)"
ATTACK = """
    import torch
    from ensemble_attacks import MORA, AutoAttack, judge
    from defenses import load_model
    model = load_model("gal_convnet_3", dataset="digits")
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    judge(model, x, y, MORA(model, eps=0.1, steps=5)(x, y), eps=0.1)
    adversary = AutoAttack(model, eps=0.1, attacks_to_run=["apgd-ce", "mora"], verbose=False)
    adversary.run_standard_evaluation(x, y)
    print(AutoAttack.__mro__[1].__module__)
"""
FRA31 = """
    import pyautoattack
    from autoattack import state

    class AutoAttack(pyautoattack.AutoAttack):
        def __init__(self, model, norm="Linf", eps=.3, seed=None, verbose=True, attacks_to_run=[], version="standard",
                     is_tf_model=False, device="cuda", log_path=None):
            attacks = attacks_to_run or None
            super().__init__(model, attacks=attacks, device=device, eps=eps, norm=norm, seed=seed, version=version)
            self.verbose = verbose
            if version != "custom":
                self.set_version(version)

        def set_version(self, version="standard"):
            self._set_version(version)
"""


def environment(folder: Path, *without: str) -> Path:
    folder.mkdir()
    for entry in SITE.iterdir():
        if not entry.name.startswith(without or ("\0",)) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


DOCTOR = "from ensemble_attacks.cli import main; main(['doctor'])"


def python(site: Path, code: str, *, project: bool = True) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(site), *([str(PROJECT)] if project else [])])
    command = [sys.executable, "-S", "-W", "ignore", "-c", textwrap.dedent(code)]
    return subprocess.run(command, env={"PYTHONPATH": paths, "HOME": str(site)}, cwd=site, capture_output=True, text=True)


def doctor(site: Path) -> str:
    return python(site, DOCTOR).stdout


def test_without_robustbench(tmp_path: Path) -> None:
    site = environment(tmp_path / "site", "robustbench", "timm")
    run = python(site, ATTACK)
    assert run.stdout.strip() == "pyautoattack.autoattack", run.stderr
    assert "pip install 'ensemble-attacks[robustbench]'" in python(site, LOAD).stderr
    assert "pip install 'ensemble-attacks[robustbench]'" in doctor(site)


def test_wheel_and_sdist(tmp_path: Path) -> None:
    """Both install, hold what runs need and no records of benchmarks, and attack a model that ships."""
    pip = [sys.executable, "-m", "pip"]
    for kind in ("wheel", "sdist"):
        site = environment(tmp_path / kind, "ensemble_attacks", "defenses", "robustbench", "timm", "sklearn", "matplotlib")
        folder = tmp_path / f"{kind}-files"
        build = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
        subprocess.run(build, cwd=PROJECT, check=True, capture_output=True)
        (package,) = folder.iterdir()
        install = [*pip, "install", "-q", "--no-deps", "--target", str(site), str(package)]
        subprocess.run(install, check=True, capture_output=True)
        assert (site / "ensemble_attacks" / "py.typed").exists()
        assert not (site / "benchmarks").exists()
        run = python(site, ATTACK, project=False)
        assert run.stdout.strip() == "pyautoattack.autoattack", run.stderr
        assert "All that is installed works together" in python(site, DOCTOR, project=False).stdout


def test_with_pyautoattack(tmp_path: Path) -> None:
    site = environment(tmp_path / "site")
    assert "function benchmark" in python(site, LOAD).stdout
    assert python(site, ATTACK).stdout.strip() == "pyautoattack.autoattack"


def test_with_fra31s_autoattack(tmp_path: Path) -> None:
    site = environment(tmp_path / "site")
    (site / "autoattack").mkdir()
    (site / "autoattack" / "__init__.py").write_text(textwrap.dedent(FRA31))
    (site / "autoattack" / "state.py").write_text("from pyautoattack.state import EvaluationState\n")
    run = python(site, ATTACK)
    assert run.stdout.strip() == "autoattack", run.stderr
    assert "function benchmark" in python(site, LOAD).stdout


def test_without_any_autoattack(tmp_path: Path) -> None:
    site = environment(tmp_path / "site", "pyautoattack")
    assert "no AutoAttack is installed: pip install pyautoattack" in python(site, ATTACK).stderr
    assert python(site, "from ensemble_attacks import MORA; print(MORA)").returncode == 0


def test_torchattacks_reinstalled_after_robustbench(tmp_path: Path) -> None:
    """Its wheel holds an old robustbench, which overwrites the real one's files."""
    site = environment(tmp_path / "site", "robustbench", "torchattacks")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
    for package in ("robustbench==1.1.1", "torchattacks==3.5.1"):
        if subprocess.run([*pip, "--upgrade", package], capture_output=True).returncode:
            pytest.skip(f"pip cannot install {package}: no network")
    run = python(site, LOAD)
    assert "overwritten by the copy inside torchattacks' wheel" in run.stderr
    assert "pip install --force-reinstall --no-deps robustbench==1.1.1" in run.stderr
    assert "--force-reinstall" in doctor(site)
