"""Forgeries of a finished run, generated over what it stores; every seal is recomputed, as a forger would."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ensemble_attacks.evaluation.leases import sealed
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.units import CLEAN, Unit, chains_of
from ensemble_attacks.threat import Threat
from tests.evaluation.renamed import others

Forge = Callable[[Path], object]
DECLARED = ("forwards", "backwards", "seconds", "finished", "torch", "trace", "outside", "disagreement", "stages")


def files_of(folder: Path, unit: Unit) -> tuple[Path, Path]:
    return folder / "units" / f"{unit.identity}.json", folder / "units" / f"{unit.identity}.safetensors"


def rewrite(folder: Path, unit: Unit, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    """Change a unit's tensors and numbers, and seal them again."""
    about, path = files_of(folder, unit)
    info, tensors = json.loads(about.read_text()), load(path.read_bytes())
    info.pop("sha256")
    change(tensors, info)
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    path.write_bytes(data)
    about.write_bytes(sealed(info | {"tensors": sha256(data).hexdigest()}))


def _flipped(tensor: Tensor) -> Tensor:
    return (1 - tensor) if tensor.dtype == torch.uint8 else -tensor


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "ones": torch.ones_like,
    "zeros": torch.zeros_like,
    "flipped": _flipped,
    "rolled": lambda tensor: tensor.roll(1, -1 if tensor.dim() < 3 else 0),
    "first flipped": lambda tensor: torch.cat([_flipped(tensor[..., :1]), tensor[..., 1:]], -1),
    "shorter": lambda tensor: tensor[..., 1:],
    "longer": lambda tensor: torch.cat([tensor, tensor[..., -1:]], -1),
    "empty": lambda tensor: tensor[..., :0],
    "another type": lambda tensor: tensor.to(torch.int32),
    "shifted": lambda tensor: tensor + 1,
    "negative": lambda tensor: (-1 - tensor) if tensor.dtype != torch.uint8 else tensor + 200,
}


def put_tensor(unit: Unit, name: str, tensor: Tensor, place: Path) -> None:
    rewrite(place, unit, lambda found, info: found.update({name: tensor.clone()}))


def drop_tensor(unit: Unit, name: str, place: Path) -> None:
    rewrite(place, unit, lambda found, info: found.pop(name))


def put_number(unit: Unit, name: str, value: Any, place: Path) -> None:
    rewrite(place, unit, lambda found, info: info.update({name: value}))


def drop_number(unit: Unit, name: str, place: Path) -> None:
    rewrite(place, unit, lambda found, info: info.pop(name))


def delete(unit: Unit, which: tuple[int, ...], place: Path) -> None:
    for index in which:
        files_of(place, unit)[index].unlink()


def put_manifest(content: dict[str, Any], place: Path) -> None:
    (place / "manifest.json").write_bytes(sealed({key: value for key, value in content.items() if key != "sha256"}))


def put_summary(text: str, place: Path) -> None:
    (place / "summary.json").write_text(text)


def of_tensors(folder: Path, unit: Unit) -> Iterator[tuple[str, Forge]]:
    """Yield forgeries of every tensor of a unit that change it, and of rows together."""
    tensors = load(files_of(folder, unit)[1].read_bytes())
    for name, tensor in tensors.items():
        for how, value in VALUES.items():
            forged = value(tensor)
            if forged.dtype != tensor.dtype or not torch.equal(forged, tensor):
                yield f"{name} {how}", partial(put_tensor, unit, name, forged)
        yield f"{name} missing", partial(drop_tensor, unit, name)
    yield "a tensor more", partial(put_tensor, unit, "more", torch.zeros(1))
    yield from of_rows(unit)


def of_rows(unit: Unit) -> Iterator[tuple[str, Forge]]:
    """Yield forgeries that keep, drop or repeat whole samples in all tensors at once."""

    def chosen(place: Path, rows: Callable[[dict[str, Tensor]], Tensor]) -> None:
        def change(found: dict[str, Tensor], info: dict[str, Any]) -> None:
            kept = rows(found)
            for name, tensor in found.items():
                if name != "right":
                    found[name] = tensor[:, kept] if name == "correct" else tensor[kept]

        rewrite(place, unit, change)

    def robust_alone(found: dict[str, Tensor]) -> Tensor:
        return torch.nonzero(found["robust"]).squeeze(-1)

    def none(found: dict[str, Tensor]) -> Tensor:
        return torch.zeros(0, dtype=torch.int64)

    def repeated(found: dict[str, Tensor]) -> Tensor:
        return torch.zeros(len(found["rows"]), dtype=torch.int64)

    def backwards(found: dict[str, Tensor]) -> Tensor:
        return torch.arange(len(found["rows"])).flip(0)

    choices = {"fooled dropped": robust_alone, "emptied": none, "one repeated": repeated, "reversed": backwards}
    for how, rows in choices.items():
        yield f"all rows {how}", lambda place, rows=rows: chosen(place, rows)  # type: ignore[misc]

    def all_robust(found: dict[str, Tensor], info: dict[str, Any]) -> None:
        for name in ("robust", "correct", "right"):
            found[name] = torch.ones_like(found[name])

    def all_invalid(found: dict[str, Tensor], info: dict[str, Any]) -> None:
        found["invalid"], found["robust"] = torch.ones_like(found["invalid"]), torch.zeros_like(found["robust"])

    yield "all robust, consistently", lambda place: rewrite(place, unit, all_robust)
    yield "all invalid, consistently", lambda place: rewrite(place, unit, all_invalid)


WRONG: tuple[Any, ...] = ({}, [], "x", -1, 0, 10**9, 10**30, 0.5, None, True, [[]], {"x": [1, 2]})


def of_numbers(folder: Path, unit: Unit) -> Iterator[tuple[str, Forge]]:
    """Yield forgeries of every number of a unit, of wrong types and out of range, too."""
    info = json.loads(files_of(folder, unit)[0].read_text())
    for name in set(info) - {"sha256", "tensors"}:
        for value in WRONG:
            if value != info[name] or type(value) is not type(info[name]):
                yield f"{name} = {value!r}", partial(put_number, unit, name, value)
        yield f"{name} missing", partial(drop_number, unit, name)
    yield "unit deleted", partial(delete, unit, (0, 1))
    yield "numbers deleted", partial(delete, unit, (0,))
    yield "tensors deleted", partial(delete, unit, (1,))


def of_manifest(folder: Path) -> Iterator[tuple[str, Forge]]:
    """Yield forgeries of every key of the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    special: dict[str, list[Any]] = {"eps": [[0.13]], "norm": ["L2"], "dataset": ["cifar10"]}
    for key, value in manifest["sweep"].items():
        others: list[Any] = [[], "x", -1, 0, 10**12, 1e300, None, [value], {}, *special.get(key, [])]
        if isinstance(value, list):
            others += [[*value, value[0]], value[1:]]
        elif isinstance(value, int):
            others += [not value] if isinstance(value, bool) else [value + 1, value - 1, value // 2]
        for other in others:
            if other != value or type(other) is not type(value):
                content = manifest | {"sweep": manifest["sweep"] | {key: other}}
                yield f"sweep.{key} = {other!r}", partial(put_manifest, content)
    for key in ("weights", "data", "code", "schema", "made", "places", "origins", "rows", "images"):
        changed = dict.fromkeys(manifest[key], "0" * 64) if key in ("weights", "made") else "0"
        for other in (changed, None, [], {}, *([manifest[key] + 1] if key == "images" else [])):
            if other != manifest[key]:
                yield f"{key} = {other!r}", partial(put_manifest, manifest | {key: other})
        yield f"{key} missing", partial(put_manifest, {name: value for name, value in manifest.items() if name != key})


MISREAD: dict[str, tuple[Any, ...]] = {  # of a stored array
    "dtype": ("float16", "object", "O", 3, None),
    "shape": ([], [1], [-1], ["x"], [10**12], 64, None),
    "data": ("", "x", "AAAA", 3, None),
}


def leaves(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        yield from leaves(value, (*path, key))
    if not isinstance(content, (dict, list)):
        yield path, content


def of_summary(folder: Path) -> Iterator[tuple[str, Forge]]:
    """Yield forgeries of every value of ``summary.json``."""
    summary = json.loads((folder / "summary.json").read_text())
    for path, value in leaves(summary):
        forged = json.loads(json.dumps(summary))
        inner = forged
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = (not value) if isinstance(value, bool) else value + 0.1 if isinstance(value, (int, float)) else "x"
        yield f"summary {'.'.join(map(str, path))}", partial(put_summary, json.dumps(forged))
    for text in ("{}", '{"cells": []}', "", "[" * 10**5):
        yield f"summary is {text[:20]!r}", partial(put_summary, text)
    yield "summary deleted", lambda place: (place / "summary.json").unlink()


def of_threat(folder: Path) -> Iterator[tuple[str, Forge]]:
    """Yield forgeries of the box, the mask and the radii of a manifest, as stored, and with the hash that they then have."""
    manifest = json.loads((folder / "manifest.json").read_text())
    stored: dict[str, Any] = manifest["threat"]
    changed: dict[str, Any] = {name: other.stored() for name, other in others(Threat.restored(stored)).items()}
    changed |= {"is {}": {}, "is []": [], "is x": "x", "is None": None}
    for key, value in stored.items():
        changed |= {f"{key} = {other!r}": stored | {key: other} for other in WRONG if other is True or other != value}
        array = value[0] if key == "radii" else value
        for part, wrong in MISREAD.items() if isinstance(array, dict) else ():
            for other in wrong:
                one = {**array, part: other}
                changed[f"{key}.{part} = {other!r}"] = stored | {key: [one] if key == "radii" else one}
    for name, content in changed.items():
        yield f"threat {name}", partial(put_manifest, manifest | {"threat": content})
    yield "threat missing", partial(put_manifest, {name: value for name, value in manifest.items() if name != "threat"})


def all_of(folder: Path) -> dict[str, list[tuple[str, Forge]]]:
    """Return the forgeries of each stored thing: of the units, those of the attack and of the clean images."""
    chain = chains_of(Ledger(folder).manifest)[0]
    clean, attacked = chain[0], chain[1]
    assert clean.attack == CLEAN
    threat = {"threat": list(of_threat(folder))} if "threat" in Ledger(folder).manifest else {}
    return threat | {
        "tensors of an attack": list(of_tensors(folder, attacked)),
        "tensors of the clean images": list(of_tensors(folder, clean)),
        "numbers of an attack": list(of_numbers(folder, attacked)),
        "numbers of the clean images": list(of_numbers(folder, clean)),
        "manifest": list(of_manifest(folder)),
        "summary": list(of_summary(folder)),
    }


def declared(kind: str, name: str) -> bool:
    """Tell whether ``verify`` says of what a forgery changes that nobody can verify it."""
    return kind.startswith("numbers") and name.split(" ")[0] in DECLARED
