"""Run units: all attacks of a cell on one range of images, in order.

With ``cascade``, an image that an earlier attack has fooled is not attacked again.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.data import load_dataset
from ensemble_attacks.errors import LedgerError
from ensemble_attacks.evaluation.estimate import batches_of
from ensemble_attacks.evaluation.identity import code_version, made_of
from ensemble_attacks.evaluation.ledger import ATTEMPTS, Ledger
from ensemble_attacks.evaluation.manifest import data_digest, logger
from ensemble_attacks.evaluation.origins import check_origin, images_of, placed
from ensemble_attacks.evaluation.runner import Attacked, attack, clean_unit, halving, judged
from ensemble_attacks.evaluation.settings import Settings
from ensemble_attacks.evaluation.summary import Standing, verdict_of
from ensemble_attacks.evaluation.units import CLEAN, Cell, Unit, chain_of, threat_of
from ensemble_attacks.files import digest
from ensemble_attacks.judge import Judgement
from ensemble_attacks.models import providers
from ensemble_attacks.models.ask import beside, moved
from ensemble_attacks.models.spread import spread
from ensemble_attacks.models.tuning import quickest, twin_for
from ensemble_attacks.models.twins import SEEN


def run_chain(folder: str, index: int, device: str = "cpu") -> list[str]:
    """Run what is not done of one chain; return the names of units that were given up."""
    ledger = Ledger(Path(folder)).go_on()
    units = chain_of(ledger.manifest, index)
    context: Context | None = None
    standing = Standing.of(units[0].range[1] - units[0].range[0])
    given_up = []
    for unit in units:
        result = ledger.read(unit)
        while result is None and ledger.open(unit):
            context = context or Context(ledger.manifest, unit, device)
            try:
                with ledger.running(unit):
                    result = ledger.write(unit, *run_unit(unit, context, standing))
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
            standing = standing.after(result.tensors["rows"], verdict_of(result))
    return given_up


class Context:
    """A context that the units of a chain share: the model, its twin and the images of the range.

    Args:
        manifest, unit: the run, and a unit of the chain.
        device: where the model is asked; separated by commas, those among which what attacks craft on is shared.
        same_code: whether the code must be that which the run began with.
        like: another context, whose model and twin serve here, too, where they are the same.

    Raises:
        LedgerError: Where code, weights or images are not those that the run began with.
    """

    def __init__(
        self, manifest: dict[str, Any], unit: Unit, device: str, *, same_code: bool = True, like: Context | None = None
    ) -> None:
        cell, places = unit.cell, manifest["places"]
        if same_code and cell.code != code_version():
            raise LedgerError(f"the run began with code {cell.code}, this is {code_version()}: install that, or begin anew")
        images = images_of(manifest)
        if data_digest(images, cell.n) != cell.data:
            where = images["name"] if images["name"] != cell.dataset else places["data_dir"]
            raise LedgerError(f"{cell.dataset} in {where} is not what the run began with: restore it")
        start, stop = unit.range
        self.attacks = manifest["sweep"]["attacks"]
        self.x, self.y = load_dataset(**images, first=start, n=stop - start)
        self.settings, self.devices = cell.settings(cell.eps, cell.seed, threat_of(manifest)), device.split(",")
        self.model_key = (cell.model, cell.vote)
        self.model: nn.Module
        if like is not None and like.model_key == self.model_key:
            self.model, self.twin = like.model, like.twin
        else:
            place = placed(manifest, cell.model)
            self.model = moved(
                providers.load_model(place, places["model_dir"], cell.dataset, vote=cell.vote), self.devices[0]
            )
            check_origin(manifest, cell.model, self.model, same_code=same_code)
            if digest(*self.model.state_dict().values()) != cell.weights:
                raise LedgerError(f"the weights of {cell.model} are not those that the run began with: restore them")
            self._check_made(cell, same_code)

    def _check_made(self, cell: Cell, same_code: bool) -> None:
        if (found := made_of(self.model, beside(self.model, self.x[:2]))) == cell.made:
            return
        told = f"the options or the code of {cell.model} are not those that the run began with ({cell.made}, now {found})"
        if same_code:
            raise LedgerError(f"{told}: restore them, or begin anew")
        logger.warning("%s: what is computed now may differ", told)

    @cached_property
    def twin(self) -> nn.Module:
        """Return the model that attacks craft on: tuned where it lies on one device, else shared among several."""
        few = beside(self.model, self.x[: self.settings.batch_size])
        twin = twin_for(self.model, few, amp=self.settings.amp)
        if self.settings.tune and len(self.devices) == 1:
            return quickest(twin, few, batches_of(self.attacks, len(self.x), self.settings))
        if self.settings.tune:
            logger.info("nothing is tuned for batches that are shared among %s", ", ".join(self.devices))
        return spread(twin, self.devices, few[:SEEN])


def run_unit(unit: Unit, context: Context, standing: Standing) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Run one unit; ``standing`` is how the samples stand after those before it.

    Returns:
        The tensors and numbers that it leaves.
    """
    x, y, settings, name = context.x, context.y, context.settings, unit.attack
    rows = standing.left if unit.before else torch.arange(len(x))
    if name == CLEAN:
        done = clean_unit(context.model, context.twin, x, y, settings)
    elif len(rows):
        done = attack(context.model, context.twin, x[rows], y[rows], name, settings)
    else:
        nothing = torch.zeros(0, dtype=torch.bool)
        judgement = Judgement(nothing, nothing, nothing, nothing.expand(settings.draws, 0), x.new_zeros(0))
        done = Attacked(x[rows], judgement, {}, [], 0, 0, 0.0, settings.batch_size)
    judgement = done.judgement
    if 0 < len(rows) < len(x):
        judgement = judged_in_place(context, rows, done.images, done.batch_size)
    stages = {part: robust for part, (robust, _, _) in done.stages.items()}
    info = {
        "forwards": done.forwards,
        "backwards": done.backwards,
        "stages": {part: list(passes) for part, (_, *passes) in done.stages.items()},
        "trace": done.trace,
        "seconds": done.seconds,
        "outside": done.outside,
        "disagreement": done.disagreement,
        "zero_gradients": done.zero_gradients,
        "failed": done.failed,
        "batch_size": done.batch_size,
        "finished": time.time(),
        "torch": torch.__version__,
    }
    return {"x_adv": done.images, **verdict_tensors(unit, rows, y[rows], judgement, stages, standing)}, info


def verdict_tensors(
    unit: Unit, rows: Tensor, labels: Tensor, judgement: Judgement, stages: dict[str, Tensor], standing: Standing
) -> dict[str, Tensor]:
    """Return what a unit stores beside its images: which samples they are of, and what the judge says of them."""
    before = standing if unit.before else Standing.of(len(standing.right))
    return {
        "rows": rows,
        "labels": labels,
        "robust": judgement.robust.to(torch.uint8),
        "invalid": judgement.invalid.to(torch.uint8),
        "correct": judgement.correct.to(torch.uint8),
        "right": before.after(rows, judgement).right,
        "margin": judgement.margin,
        **{f"stage {part}": robust.to(torch.uint8) for part, robust in stages.items()},
    }


def judged_in_place(context: Context, rows: Tensor, images: Tensor, batch_size: int) -> Judgement:
    """Return the verdict on the images of some ``rows``, judged among the whole range.

    The draws of a random model follow the place in the batch, and only where they are the same is the worst case over
    attacks no luckiest draw.
    """
    whole = context.x.clone().to(images)
    whole[rows] = images

    def work(settings: Settings) -> Judgement:
        return judged(context.model, context.x, context.y, whole, settings)

    verdict = halving(replace(context.settings, batch_size=batch_size), "the judge", work)
    parts = (verdict.robust, verdict.fooled, verdict.invalid, verdict.correct, verdict.margin)
    return Judgement(*(part[..., rows] for part in parts))
