"""Forgeries of what a run is asked for, by who computes all names, hashes and verdicts again: only the images stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble_attacks import OutOfBallError
from ensemble_attacks.evaluation.chains import Context, judged_in_place, verdict_tensors
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.manifest import data_digest
from ensemble_attacks.evaluation.origins import images_of
from ensemble_attacks.evaluation.summary import Standing, summarise, verdict_of
from ensemble_attacks.evaluation.units import chains_of
from ensemble_attacks.norms import Box
from ensemble_attacks.threat import Threat

RADII: dict[str, Callable[[Tensor], Tensor]] = {
    "twice": lambda radii: 2 * radii,
    "half": lambda radii: radii / 2,
    "the largest everywhere": lambda radii: torch.full_like(radii, radii.max().item()),
    "rolled": lambda radii: radii.roll(1, -1),
}
MASKS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "everything": torch.ones_like,
    "nothing said": lambda mask: None,
    "what may not": torch.logical_not,
    "one feature": lambda mask: torch.zeros_like(mask).index_fill(-1, torch.tensor(0), True),
    "rolled": lambda mask: mask.roll(1, -1),
}
BOXES: dict[str, Callable[[Box], Box]] = {
    "wider": lambda box: Box(box.low - 0.1, box.high + 0.1),
    "narrower": lambda box: Box(box.low + 0.1, box.high - 0.1),
    "higher": lambda box: Box(box.low, box.high + 0.01),
    "of each feature": lambda box: Box(torch.full((1, 8, 8), -1.0), torch.ones(1, 8, 8)),
    "[0, 1]": lambda box: Box(0, 1),
}


def others(threat: Threat) -> dict[str, Threat]:
    """Return threats that are not this one, which has a box, a mask, and radii for each feature, by name."""
    ((_, radii),) = threat.radii.items()
    assert threat.mask is not None
    found = {f"radii {how}": replace(threat, radii={r.max().item(): r}) for how, f in RADII.items() for r in (f(radii),)}
    found |= {f"movable: {how}": replace(threat, mask=change(threat.mask)) for how, change in MASKS.items()}
    found |= {f"box {how}": replace(threat, box=change(threat.box)) for how, change in BOXES.items()}
    return found | {"no radii": replace(threat, radii={})}


def asked_otherwise(folder: Path) -> dict[str, dict[str, Any]]:
    """Return manifests that ask for something else than a run's, by what is other."""
    manifest = Ledger(folder).manifest
    sweep: dict[str, Any] = manifest["sweep"]
    changes: dict[str, Any] = {
        "norm": "L2",
        "draws": sweep["draws"] + 2,
        "seeds": [7],
        "attacks": ["ea-apgd-dlr", *sweep["attacks"][1:]],
        "eot_iter": 9,
        "cascade": not sweep["cascade"],
    }
    found = {f"{key} = {value}": manifest | {"sweep": sweep | {key: value}} for key, value in changes.items()}
    if "threat" not in manifest:
        for eps in (0.5, 2.0):
            found[f"eps times {eps}"] = manifest | {"sweep": sweep | {"eps": [eps * value for value in sweep["eps"]]}}
        return found
    for name, other in others(Threat.restored(manifest["threat"])).items():
        named = {"eps": list(other.radii) or sweep["eps"]}
        found[name] = manifest | {"threat": other.stored(), "sweep": sweep | named}
    return found


def rename(folder: Path, manifest: dict[str, Any], out: Path) -> bool:
    """Write a run's images as another run's, judged as that one asks; return whether they can be."""
    old = Ledger(folder)
    try:
        new = Ledger(out, manifest | {"data": data_digest(images_of(manifest), manifest["sweep"]["n"])})
    except ValueError:
        return False  # there are no such images
    for units, renamed in zip(chains_of(old.manifest), chains_of(new.manifest), strict=True):
        context, standing = Context(new.manifest, renamed[0], "cpu"), Standing.of(renamed[0].range[1])
        for unit, other in zip(units, renamed, strict=True):
            result = old.read(unit)
            assert result is not None
            rows = standing.left if other.before else torch.arange(len(context.x))
            if not set(rows.tolist()) <= set(result.tensors["rows"].tolist()):
                return False  # there are no images of some of them
            images = result.tensors["x_adv"][torch.isin(result.tensors["rows"], rows)]
            stages = {part: result.tensors[f"stage {part}"] for part in result.info["stages"]}
            try:
                judgement = judged_in_place(context, rows, images, other.cell.batch_size)
            except OutOfBallError:
                return False
            told = verdict_tensors(other, rows, context.y[rows], judgement, stages, standing)
            forged = new.write(other, {"x_adv": images, **told}, {k: v for k, v in result.info.items() if k != "unit"})
            standing = standing.after(rows, verdict_of(forged))
    summarise(new)
    return True
