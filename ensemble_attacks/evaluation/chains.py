"""Run units: all attacks of a cell on one range of images, in order.

With ``cascade``, an image that an earlier attack has fooled is not attacked again.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.data import load_dataset
from ensemble_attacks.errors import LedgerError
from ensemble_attacks.evaluation.ledger import ATTEMPTS, Ledger, Result
from ensemble_attacks.evaluation.manifest import code_version, data_digest, logger
from ensemble_attacks.evaluation.origins import check_origin, images_of, placed
from ensemble_attacks.evaluation.runner import Attacked, attack, judged
from ensemble_attacks.evaluation.summary import share_right
from ensemble_attacks.evaluation.units import CLEAN, Unit, chains_of
from ensemble_attacks.files import digest
from ensemble_attacks.judge import Judgement
from ensemble_attacks.models import providers
from ensemble_attacks.models.twins import prepare


def run_chain(folder: str, index: int, device: str = "cpu") -> list[str]:
    """Run what is not done of one chain; return the names of units that were given up."""
    ledger = Ledger(Path(folder))
    units = chains_of(ledger.manifest)[index]
    context: Context | None = None
    right: Tensor | None = None
    given_up = []
    for unit in units:
        result = ledger.read(unit)
        while result is None and ledger.open(unit):
            context = context or Context(ledger.manifest, unit, device)
            try:
                with ledger.running(unit):
                    result = _run_unit(ledger, unit, context, right)
            except LedgerError:  # no failure of the unit's
                raise
            except Exception as error:  # whatever a model or an attack raises: the others go on
                logger.warning("%s failed (%d of %d): %s", unit.name, ledger.failures(unit) + 1, ATTEMPTS, error)
                ledger.fail(unit, f"{type(error).__name__}: {error}")
        if result is None:
            given_up.append(unit.name)
            if unit.cell.cascade:
                break  # what follows depends on it
        else:
            right = result.tensors["right"] if right is None else right.minimum(result.tensors["right"])
    return given_up


class Context:
    """A context that the units of a chain share: the model, its twin and the images of the range.

    Raises:
        LedgerError: Where code (unless another will do), weights or images are not those that the run began with.
    """

    def __init__(self, manifest: dict[str, Any], unit: Unit, device: str, *, same_code: bool = True) -> None:
        cell, places = unit.cell, manifest["places"]
        if same_code and cell.code != code_version():
            raise LedgerError(f"the run began with code {cell.code}, this is {code_version()}: install that, or begin anew")
        place = placed(manifest, cell.model)
        self.model = providers.load_model(place, places["model_dir"], cell.dataset, vote=cell.vote).to(device)
        check_origin(manifest, cell.model, self.model, same_code=same_code)
        if digest(*self.model.state_dict().values()) != cell.weights:
            raise LedgerError(f"the weights of {cell.model} are not those that the run began with: restore them")
        images = images_of(manifest)
        if data_digest(images, cell.n) != cell.data:
            where = images["name"] if images["name"] != cell.dataset else places["data_dir"]
            raise LedgerError(f"{cell.dataset} in {where} is not what the run began with: restore it")
        start, stop = unit.range
        self.x, self.y = load_dataset(**images, first=start, n=stop - start)
        self.settings = cell.settings
        self.twin: nn.Module = prepare(self.model, self.x[:8].to(device), amp=self.settings.amp)


def _run_unit(ledger: Ledger, unit: Unit, context: Context, right: Tensor | None) -> Result:
    """Run one unit; ``right`` is every sample's share of right draws under the attacks before it."""
    x, y, settings, name = context.x, context.y, context.settings, unit.attack
    rows = torch.arange(len(x))
    if unit.cell.cascade and right is not None:
        rows = torch.nonzero(right > 0.5).squeeze(-1)
    if name == CLEAN:
        done = Attacked(x, judged(context.model, x, y, x, settings), {}, [], 0, 0, 0.0, settings.batch_size)
    elif len(rows):
        done = attack(context.model, context.twin, x[rows], y[rows], name, settings)
    else:
        nothing = torch.zeros(0, dtype=torch.bool)
        judgement = Judgement(nothing, nothing, nothing, nothing.expand(settings.draws, 0), x.new_zeros(0))
        done = Attacked(x[rows], judgement, {}, [], 0, 0, 0.0, settings.batch_size)
    judgement = done.judgement
    if 0 < len(rows) < len(x):
        judgement = _judged_in_place(context, rows, done.images, done.batch_size)
    before = torch.zeros(len(x), dtype=torch.float64) if right is None else right
    shares, found = before.clone(), share_right(judgement, before[rows])
    shares[rows] = found.minimum(before[rows]) if unit.before else found
    tensors = {
        "rows": rows,
        "x_adv": done.images,
        "labels": y[rows],
        "robust": judgement.robust.to(torch.uint8),
        "invalid": judgement.invalid.to(torch.uint8),
        "correct": judgement.correct.to(torch.uint8),
        "right": shares,
        "margin": judgement.margin,
        **{f"stage {part}": robust.to(torch.uint8) for part, (robust, _, _) in done.stages.items()},
    }
    info = {
        "forwards": done.forwards,
        "backwards": done.backwards,
        "stages": {part: list(passes) for part, (_, *passes) in done.stages.items()},
        "trace": done.trace,
        "seconds": done.seconds,
        "outside": done.outside,
        "failed": done.failed,
        "batch_size": done.batch_size,
        "finished": time.time(),
        "torch": torch.__version__,
    }
    return ledger.write(unit, tensors, info)


def _judged_in_place(context: Context, rows: Tensor, images: Tensor, batch_size: int) -> Judgement:
    """Return the verdict on the images of some ``rows``, judged among the whole range.

    The draws of a random model follow the place in the batch, and only where they are the same is the worst case over
    attacks no luckiest draw.
    """
    whole = context.x.clone().to(images)
    whole[rows] = images
    verdict = judged(context.model, context.x, context.y, whole, replace(context.settings, batch_size=batch_size))
    parts = (verdict.robust, verdict.fooled, verdict.invalid, verdict.correct, verdict.margin)
    return Judgement(*(part[..., rows] for part in parts))
