"""Folders, bundles, cards, weights and files of strangers, damaged in every way that anybody has thought of."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from defenses.zoo.load import SHIPPED
from ensemble_attacks.evaluation.leases import sealed

GIGABYTES = 3 << 30
CARD = "gal_convnet_3"
Damage = Callable[[Path], object]


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


def bundles() -> dict[str, Damage]:
    """Return the damages of a bundle, by name."""
    damages: dict[str, Damage] = {}
    for how, tensor in bundle_tensors().items():
        damages[f"images are {how}"] = partial(_save, tensor)
    for how, damage in RAW.items():
        damages[f"images: {how}"] = _in("adversarial_images.pt", damage)
        damages[f"about: {how}"] = _in("model_info.json", damage)
    for key, value in (("eps", "1e9999999"), ("eps", "9" * 401), ("eps", -1), ("draws", 10**12), ("dataset", ["x"])):
        damages[f"about {key} = {str(value)[:20]}"] = partial(_say, key, value)
    return damages


def _in(name: str, damage: Damage) -> Damage:
    return lambda folder: damage(folder / name)


def _save(tensor: Any, folder: Path) -> None:
    torch.save(tensor, folder / "adversarial_images.pt")


def _say(key: str, value: Any, folder: Path) -> None:
    path = folder / "model_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def cards(folder: Path) -> dict[str, Callable[[], object]]:
    """Return what makes damaged cards and weights of `CARD` in a folder of models, by name; the sound ones are there now."""
    home = SHIPPED / "digits" / "Linf"
    card, weights = json.loads((home / f"{CARD}.json").read_text()), load((home / f"{CARD}.safetensors").read_bytes())
    key = next(key for key, value in weights.items() if value.dim() > 1)
    (place := folder / "digits" / "Linf").mkdir(parents=True)
    about, path = place / f"{CARD}.json", place / f"{CARD}.safetensors"

    def put(content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for old in (about, path, about.with_name("target")):
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)
        path.write_bytes(data := save(tensors))
        about.write_text(json.dumps(content | {"sha256": sha256(data).hexdigest()}))

    def damaged(place: Path, damage: Damage) -> None:
        put(card, weights)
        damage(place)

    changes: list[dict[str, Any]] = [
        *({"members": value} for value in (10**9, 0, -1, 1.5, True, "3", 900)),
        *({"num_classes": value} for value in (10**12, 1, "ten")),
        *({"negative_slope": value} for value in (-1, 1e300, "x")),
        *({"normalization": value} for value in ([], [[0.5]], [[0.5], [0.0]], "cifar10", [["a"], ["b"]])),
        *({"architecture": value} for value in ("", "resnet999999", 3, "../../x")),
    ]
    changed: dict[str, dict[str, Tensor]] = {
        "integers": weights | {key: weights[key].to(torch.int8)},
        "float8": weights | {key: weights[key].to(torch.float8_e4m3fn)},
        "another shape": weights | {key: weights[key][:1]},
        "a tensor more": weights | {"more": torch.zeros(1)},
        "a tensor less": {k: v for k, v in weights.items() if k != key},
        "nothing": {},
    }
    put(card, weights)
    found: dict[str, Callable[[], object]] = {f"card {change}": partial(put, card | change, weights) for change in changes}
    found |= {f"weights: {how}": partial(put, card, tensors) for how, tensors in changed.items()}
    return found | {
        f"{place.suffix}: {how}": partial(damaged, place, damage) for how, damage in RAW.items() for place in (about, path)
    }


def archive(**entries: bytes) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def array(shape: tuple[int, ...], data: bytes, kind: str = "|u1") -> bytes:
    """Return a ``.npy`` file that says that it has this shape."""
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer := io.BytesIO(), header)
    return buffer.getvalue() + data


def named_files(folder: Path) -> dict[str, tuple[Callable[[], object], list[str]]]:
    """Return what makes damaged files that a user names, by name, and the commands that read them."""
    labels = array((4,), bytes(4))
    lies = {
        "a shape of terabytes": archive(images=array((10**6, 3, 1000, 1000), bytes(9)), labels=labels),
        "a shape beyond all": archive(images=array((10**15, 10**15), bytes(9)), labels=labels),
        "unpacked gigabytes": archive(images=array((4, 3, 512, 1 << 20), bytes(5 << 20)), labels=labels),
        "objects": archive(images=array((1,), bytes(64), "|O"), labels=labels),
        "no arrays": archive(images=b"hello", labels=labels),
        "a code": archive(images=array((4, 1, 8, 8), bytes(256)), labels=b"\x93NUMPY\x09\x09"),
    }
    found: dict[str, tuple[Callable[[], object], list[str]]] = {}

    def put(path: Path, content: bytes, damage: Damage | None = None) -> None:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.with_name("target").unlink(missing_ok=True)
        path.write_bytes(content)
        if damage is not None:
            damage(path)

    command = ["evaluate", "--model", CARD, "--eps", "0.1", "--n", "2", "--attacks", "torchattacks:FGSM", "--out"]
    command += [str(folder / "out"), "--data"]
    for how, content in lies.items():
        found[f".npz: {how}"] = partial(put, folder / "data.npz", content), [*command, str(folder / "data.npz")]
    for suffix in (".npz", ".safetensors"):
        for how, damage in RAW.items():
            path = folder / f"data{suffix}"
            found[f"{suffix}: {how}"] = partial(put, path, b"x" * 100, damage), [*command, str(path)]
    for how, damage in RAW.items():
        found[f".toml: {how}"] = partial(put, folder / "sweep.toml", b"x = 1", damage), ["sweep", str(folder / "sweep.toml")]
    found[".toml: nested"] = (
        partial(put, folder / "sweep.toml", b"x = " + b"[" * 10**5),
        ["sweep", str(folder / "sweep.toml")],
    )
    return found
