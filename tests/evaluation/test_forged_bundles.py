"""A bundle that nobody holds against its run: what is forged in it is caught, or declared not verifiable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemble_attacks import LedgerError
from ensemble_attacks.cli.verification import _examine
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.external import ABOUT, IMAGES, RUN, TEXT, export_robustbench
from ensemble_attacks.evaluation.leases import sealed
from tests.evaluation.forgeries import VALUES, WRONG
from tests.evaluation.test_ledger import ledger_in

Forge = Callable[[Path], object]
CLAIMED = dict.fromkeys(("vote", "dataset", "norm", "eps", "draws", "transform"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "run"
    run(ledger_in(folder, attacks=("torchattacks:FGSM", "ea-apgd-ce"), n=6, shard_size=3))
    return export_robustbench(folder, folder.with_name("bundle"), partial=True)


def put(name: str, content: bytes, place: Path) -> None:
    (place / name).write_bytes(content)


def save(images: Any, place: Path) -> None:
    torch.save(images, place / IMAGES)


def of_about(bundle: Path) -> Iterator[tuple[str, Forge]]:
    about = json.loads((bundle / ABOUT).read_text())
    for key, value in about.items():
        for other in (*WRONG, "0.00", "99.00", "L2", "voting", "cifar10"):
            if other != value or type(other) is not type(value):
                yield f"{key} = {other!r}", partial(put, ABOUT, json.dumps(about | {key: other}).encode())


def of_run(bundle: Path) -> Iterator[tuple[str, Forge]]:
    manifest = json.loads((bundle / RUN).read_text())
    manifest.pop("sha256")
    for key, value in manifest["sweep"].items():
        for other in (*WRONG, "L2", "voting", [0.2], ["x"]):
            if other != value or type(other) is not type(value):
                content = sealed(manifest | {"sweep": manifest["sweep"] | {key: other}})
                yield f"{RUN} sweep.{key} = {other!r}", partial(put, RUN, content)


def of_text(bundle: Path) -> Iterator[tuple[str, Forge]]:
    lines = (bundle / TEXT).read_text().splitlines(keepends=True)
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        for how, new in {"missing": "", "twice": line * 2, "more": line + "Robust accuracy: 99.00%\n"}.items():
            yield (
                f"{TEXT} {line.strip()[:30]!r} {how}",
                partial(put, TEXT, "".join([*lines[:number], new, *lines[number + 1 :]]).encode()),
            )
        for digit in "0123456789":
            if digit in line:
                new = line.replace(digit, "7" if digit != "7" else "8", 1)
                yield (
                    f"{TEXT} {line.strip()[:30]!r} without a {digit}",
                    partial(put, TEXT, "".join([*lines[:number], new, *lines[number + 1 :]]).encode()),
                )


def of_images(bundle: Path) -> Iterator[tuple[str, Forge]]:
    images = torch.load(bundle / IMAGES, weights_only=True)
    for how, change in VALUES.items():
        yield f"images {how}", partial(save, change(images))


def found(bundle: Path) -> object:
    """Return what `verify` finds in a bundle; the kind of error where it refuses to look."""
    places, claimed = {"model_dir": None, "data_dir": "data"}, {"model": "gal_convnet_3", **CLAIMED}
    try:
        return [finding["differ"] for finding in _examine(bundle, places, claimed, 0, 0, "cpu")[0]]
    except (LedgerError, FileNotFoundError, ValueError, TypeError) as error:
        return type(error).__name__


DECLARED = (  # what `NOT_VERIFIABLE` names: accuracies by attack, the digest; and what only crafting anew tells
    "autoattack_acc",
    "unreliable = None",  # nothing is said
    f"{TEXT} '- ",
    f"{TEXT} 'Run: digest",
    f"{RUN} sweep.amp",
    f"{RUN} sweep.cascade",
    f"{RUN} sweep.only_correct",
)


def missed(bundle: Path, place: Path, some: slice) -> list[str]:
    """Make some of the forgeries, and return those that are neither caught nor declared."""
    honest = found(bundle)
    assert honest == [0]
    forgeries = [*of_about(bundle), *of_run(bundle), *of_text(bundle), *of_images(bundle)][some]
    counts, left = {"caught": 0, "declared": 0}, []
    for name, forge in forgeries:
        shutil.copytree(bundle, folder := place / "forged")
        forge(folder)
        if found(folder) != honest:
            counts["caught"] += 1
        elif name.startswith(DECLARED) and not name.endswith(("missing", "twice", "more")):
            counts["declared"] += 1
        else:
            left.append(name)
        shutil.rmtree(folder)
    print(json.dumps(counts))  # noqa: T201
    return left


def test_forgeries_of_a_bundle_are_caught_or_declared(bundle: Path, tmp_path: Path) -> None:
    assert not missed(bundle, tmp_path, slice(None, None, 24))


@pytest.mark.slow
def test_every_forgery_of_a_bundle_is_caught_or_declared(bundle: Path, tmp_path: Path) -> None:
    assert not missed(bundle, tmp_path, slice(None))
