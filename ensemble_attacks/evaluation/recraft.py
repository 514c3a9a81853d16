"""Craft some units of a run anew, and compare what comes out with what is stored, bit for bit."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from torch import Tensor

from ensemble_attacks.errors import reason
from ensemble_attacks.evaluation.chains import Context, run_unit
from ensemble_attacks.evaluation.ledger import Ledger, Result
from ensemble_attacks.evaluation.summary import VOLATILE, Standing, verdict_of
from ensemble_attacks.evaluation.units import chain_of, count_chains


def recraft_units(ledger: Ledger, sound: dict[str, Result], device: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Return, for ``count`` units drawn by ``seed`` from all that attack, what differs when they are crafted anew.

    Args:
        ledger: the run.
        sound: results, by the units' identities, as they should be; of what stands before a unit of a cascade.
        device: where the model is asked.
    """
    attacks = len(ledger.manifest["sweep"]["attacks"])
    everything = count_chains(ledger.manifest) * attacks
    drawn = sorted(random.Random(seed).sample(range(everything), min(count, everything)))
    return [_recrafted(ledger, divmod(number, attacks), sound, device) for number in drawn]


def _recrafted(ledger: Ledger, place: tuple[int, int], sound: dict[str, Result], device: str) -> dict[str, Any]:
    chain = chain_of(ledger.manifest, place[0])
    unit = chain[1 + place[1]]
    finding: dict[str, Any] = {"unit": f"{unit.name}, crafted anew", "n": 0, "robust": 0, "differ": None}
    before = [sound.get(earlier.identity) for earlier in chain[: 1 + place[1]]]
    try:
        stored = ledger.examine(unit)
    except (FileNotFoundError, ValueError) as error:
        return finding | {"what": [f"there is nothing to compare it with: {error}"]}
    if unit.before and not all(before):
        return finding | {"what": ["it follows, in a cascade, what is missing or damaged"]}
    standing = Standing.of(unit.range[1] - unit.range[0])
    for result in before if unit.before else []:
        assert result is not None
        standing = standing.after(result.tensors["rows"], verdict_of(result))
    context = Context(ledger.manifest, unit, device, same_code=False)
    context.settings = replace(context.settings, batch_size=stored.info["batch_size"])
    try:
        tensors, info = run_unit(unit, context, standing)
    except Exception as error:  # whatever a name that is no attack's, a model or an attack raises
        return finding | {"what": [f"it cannot be crafted here: {reason(error)}"]}
    what = {
        name: count
        for name, tensor in tensors.items()
        if (count := unequal(stored.tensors.get(name), tensor, name == "x_adv"))
    }
    what |= {name: 1 for name, value in info.items() if name not in VOLATILE and stored.info.get(name) != value}
    n, robust = len(tensors["rows"]), int(tensors["robust"].sum())
    lines = [f"{name}: {count} differ" for name, count in what.items()]
    return finding | {"n": n, "robust": robust, "differ": sum(what.values()), "what": lines}


def unequal(stored: Tensor | None, anew: Tensor, images: bool = True) -> int:
    """Return how many samples, along the last or (of images) the first dimension, are not equal to the last bit."""
    anew = anew.cpu()
    if stored is None or stored.shape != anew.shape or stored.dtype != anew.dtype:
        return max(len(anew), 1)
    same = (stored == anew) | ((stored != stored) & (anew != anew))
    return int((~(same.flatten(1).all(1) if images else same)).sum())
