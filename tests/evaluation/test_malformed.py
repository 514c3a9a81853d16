"""Folders, bundles, cards and weights of strangers: each is refused in one line, nothing is run, written or waited for."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load, save
from torch import Tensor, nn

from defenses import load_model
from defenses.zoo.load import SHIPPED
from ensemble_attacks import WeightsError
from ensemble_attacks.cli.group import main
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.external import export_robustbench
from ensemble_attacks.evaluation.leases import sealed
from tests.evaluation.test_ledger import ledger_in

GIGABYTES = 3 << 30
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(ledger_in(folder, attacks=("torchattacks:FGSM",), n=4, shard_size=4))
    return folder


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def content_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        found[str(path.relative_to(folder))] = (about.st_mode, about.st_size, about.st_mtime_ns)
    return found


def refused(arguments: list[str], folder: Path, codes: tuple[int, ...] = (2,)) -> str:
    """Run a command; return what is wrong with how it ended, empty if nothing is."""
    before, held, began = content_of(folder), megabytes(), time.monotonic()
    result = CliRunner().invoke(main, arguments)
    spent, grown = time.monotonic() - began, megabytes() - held
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"{type(result.exception).__name__}: {result.exception}"
    if result.exit_code not in codes:
        return f"exit code {result.exit_code}: {result.output[-300:]}"
    if result.exit_code == 2 and len(result.output.strip().splitlines()) > 4:  # usage, and one line
        return f"{len(result.output.splitlines())} lines: {result.output[:300]}"
    if spent > 60 or grown > 500:  # 5 seconds where the machine is not shared by many
        return f"{spent:.1f} s, {grown:.0f} MB"
    return "" if content_of(folder) == before else "the folder was written"


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(GIGABYTES)


def linked(path: Path) -> None:
    target = path.with_name("target")
    path.rename(target)
    path.symlink_to(target)


def to_a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def moved(path: Path) -> None:
    path.rename(path.with_name("away"))
    path.symlink_to("away")


def no_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


RAW: dict[str, Damage] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": halved,
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 8),
    "brackets": lambda path: path.write_bytes(b"[" * 200_000),
    "objects": lambda path: path.write_bytes(b'{"a":' * 200_000),
    "a list": lambda path: path.write_bytes(b"[1, 2]"),
    "null": lambda path: path.write_bytes(b"null"),
    "a long number": lambda path: path.write_bytes(b"1" * 6000),
    "sparse": sparse,
    "a link": linked,
    "a link to a device": to_a_device,
    "a pipe": piped,
    "a folder": a_folder,
}
VALUES: tuple[Any, ...] = (None, [], {}, -1, 0, 10**12, 10**400, 1e300, "1e9999999")


def resealed(path: Path, *keys: str, value: Any) -> None:
    """Change one value of sealed JSON, and seal it again."""
    content = json.loads(path.read_text())
    content.pop("sha256")
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_bytes(sealed(content))


def folders(run: Path) -> dict[str, tuple[Path, Damage]]:
    """Return the damages of a run's folder, by name, each with the file that it is done to."""
    manifest = run / "manifest.json"
    info = next(iter(sorted(run.glob("units/*.json"))))
    tensors = info.with_suffix(".safetensors")
    found: dict[str, tuple[Path, Damage]] = {}
    for path in (manifest, info, tensors):
        found |= {f"{path.suffix} {path.parent.name} {how}": (path, damage) for how, damage in RAW.items()}
    for key in ("models", "eps", "attacks", "seeds", "n", "shard_size", "draws", "batch_size", "dataset"):
        for value in VALUES:
            name = f"manifest {key} = {str(value)[:20]}"
            found[name] = (manifest, _at(("sweep", key), value))
    for part in ("units", "failed", "running", "quarantine"):
        found[f"{part} is a link"] = (run / part, moved)
        found[f"{part} is a file"] = (run / part, no_folder)
    return found


def _at(keys: tuple[str, ...], value: Any) -> Damage:
    return lambda path: resealed(path, *keys, value=value)


HARMLESS = ("failed", "running", "quarantine")  # refused, or passed by


def test_malformed_folders(finished: Path, tmp_path: Path) -> None:
    damages, wrong = folders(finished), {}
    assert len(damages) >= 113
    for name, (path, damage) in damages.items():
        shutil.copytree(finished, folder := tmp_path / "run", symlinks=True)
        damage(folder / path.relative_to(finished))
        for command in ("status", "verify"):
            # what is damaged inside a unit, `status` need not see
            codes = (0, 2) if command == "status" else (0, 1, 2) if name.startswith(HARMLESS) else (1, 2)
            if told := refused([command, str(folder)], tmp_path, codes):
                wrong[f"{name}: {command}"] = told
        shutil.rmtree(folder)
    assert not wrong, [f"{name}: {told}" for name, told in wrong.items()]


class Sub(Tensor):
    pass


def bundle_tensors() -> dict[str, Any]:
    x = torch.rand(4, 1, 8, 8)
    return {
        "expanded": torch.zeros(1, 1, 8, 8).expand(10**7, 1, 8, 8),
        "expanded everywhere": torch.zeros(()).expand(10**5, 3, 1000, 1000),
        "sparse": x.to_sparse(),
        "meta": torch.empty(10**6, 3, 32, 32, device="meta"),
        "quantised": torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        "a subclass": x.as_subclass(Sub),
        "complex": x.to(torch.complex64),
        "integers": (255 * x).to(torch.uint8),
        "float8": x.to(torch.float8_e4m3fn),
        "NaN": x * torch.nan,
        "255": 255 * x,
        "three dimensions": x[0],
        "no images": x[:0],
        "of another size": torch.rand(4, 3, 32, 32),
        "a list": [x],
        "a dictionary": {"images": x},
        "code": {"x": nn.Linear(2, 2)},
        "a number": 1,
        "nested": nested(100),
    }


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.filterwarnings("ignore")  # torch's, of quantised tensors
def test_malformed_bundles(finished: Path, tmp_path: Path) -> None:
    bundle = export_robustbench(finished, tmp_path / "bundle", partial=True)
    damages: dict[str, Damage] = {}
    for how, tensor in bundle_tensors().items():
        damages[f"images are {how}"] = partial(_save, tensor)
    for how, damage in RAW.items():
        damages[f"images: {how}"] = _in("adversarial_images.pt", damage)
        damages[f"about: {how}"] = _in("model_info.json", damage)
    for key, value in (("eps", "1e9999999"), ("eps", "9" * 401), ("eps", -1), ("draws", 10**12), ("dataset", ["x"])):
        damages[f"about {key} = {str(value)[:20]}"] = partial(_say, key, value)
    wrong = {}
    assert len(damages) >= 40
    for name, damage in damages.items():
        shutil.copytree(bundle, folder := tmp_path / "damaged")
        damage(folder)
        if told := refused(["verify", str(folder), "--model", "gal_convnet_3", "--recraft", "0"], tmp_path, (1, 2)):
            wrong[name] = told
        shutil.rmtree(folder)
    assert not wrong, [f"{name}: {told}" for name, told in wrong.items()]


def _in(name: str, damage: Damage) -> Damage:
    return lambda folder: damage(folder / name)


def _save(tensor: Any, folder: Path) -> None:
    torch.save(tensor, folder / "adversarial_images.pt")


def _say(key: str, value: Any, folder: Path) -> None:
    path = folder / "model_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def test_malformed_cards_and_weights(tmp_path: Path) -> None:
    name = "gal_convnet_3"
    home = SHIPPED / "digits" / "Linf"
    card, weights = json.loads((home / f"{name}.json").read_text()), load((home / f"{name}.safetensors").read_bytes())
    key = next(key for key, value in weights.items() if value.dim() > 1)
    folder = tmp_path / "digits" / "Linf"
    folder.mkdir(parents=True)
    about, path = folder / f"{name}.json", folder / f"{name}.safetensors"

    def put(content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        data = save(tensors)
        path.write_bytes(data)
        about.write_text(json.dumps(content | {"sha256": sha256(data).hexdigest()}))

    cards: list[dict[str, Any]] = [
        *({"members": value} for value in (10**9, 0, -1, 1.5, True, "3", 900)),
        *({"num_classes": value} for value in (10**12, 1, "ten")),
        *({"negative_slope": value} for value in (-1, 1e300, "x")),
        *({"normalization": value} for value in ([], [[0.5]], [[0.5], [0.0]], "cifar10", [["a"], ["b"]])),
        *({"architecture": value} for value in ("", "resnet999999", 3, "../../x")),
    ]
    changed: list[dict[str, Tensor]] = [
        weights | {key: weights[key].to(torch.int8)},
        weights | {key: weights[key].to(torch.float8_e4m3fn)},
        weights | {key: weights[key][:1]},
        weights | {"more": torch.zeros(1)},
        {k: v for k, v in weights.items() if k != key},
        {},
    ]

    def damaged(place: Path, damage: Damage) -> None:
        put(card, weights)
        damage(place)

    cases: list[Callable[[], object]] = [partial(put, card | change, weights) for change in cards]
    cases += [partial(put, card, tensors) for tensors in changed]
    cases += [partial(damaged, place, damage) for damage in RAW.values() for place in (about, path)]
    assert len(cases) >= 30
    put(card, weights)
    load_model(name, tmp_path, "digits")
    for case in cases:
        for place in (about, path, about.with_name("target")):
            shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink(missing_ok=True)
        case()
        held = megabytes()
        with pytest.raises((WeightsError, ValueError)) as error:
            load_model(name, tmp_path, "digits")
        assert len(str(error.value).splitlines()) <= 3 or "does not fit" in str(error.value)
        assert megabytes() - held < 500
