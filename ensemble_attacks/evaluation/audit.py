"""Look at a run from outside: how far it is, and whether its images are worth what it says."""

from __future__ import annotations

from typing import Any

from ensemble_attacks.evaluation.chains import Context, _judged_in_place
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.manifest import warn_of_code
from ensemble_attacks.evaluation.origins import placed_anew
from ensemble_attacks.evaluation.units import Unit, chains_of


def verify(
    ledger: Ledger,
    device: str = "cpu",
    *,
    data_dir: str | None = None,
    model_dir: str | None = None,
    model: str | None = None,
    dataset: str | None = None,
) -> list[dict[str, Any]]:
    """Judge every stored image anew, from the model and the data alone, which may lie elsewhere by now.

    Args:
        ledger: the run.
        device: where the model is asked.
        data_dir, model_dir: where data and models lie by now; ``None``: where they lay.
        model, dataset: names that the run's model and data have by now; ``None``: theirs.

    Returns:
        For each unit ``unit`` (its name), ``n``, ``robust`` (now) and ``differ``, the number of samples whose verdict is not
        the one stored; ``differ`` is ``None`` for a unit that is missing or damaged. A unit that attacked no images is left
        out.

    Raises:
        LedgerError: Where a model's source, weights or images are not those that the run began with.
        OutOfBallError: Where a stored image is outside the ball.
    """
    findings: list[dict[str, Any]] = []
    warn_of_code(ledger)
    manifest = placed_anew(ledger.manifest, model, dataset)
    manifest["places"] |= {k: v for k, v in (("data_dir", data_dir), ("model_dir", model_dir)) if v is not None}
    for chain in chains_of(manifest):
        context: Context | None = None
        for unit in chain:
            result = ledger.read(unit)
            if result is None:
                findings.append({"unit": unit.name, "n": 0, "robust": 0, "differ": None})
                continue
            if not len(result.tensors["rows"]):
                continue
            context = context or Context(manifest, unit, device, same_code=False)
            rows = result.tensors["rows"]
            verdict = _judged_in_place(context, rows, result.tensors["x_adv"], result.info["batch_size"])
            differ = int((verdict.robust != result.tensors["robust"].bool()).sum())
            findings.append({"unit": unit.name, "n": len(rows), "robust": int(verdict.robust.sum()), "differ": differ})
    return findings


def progress(ledger: Ledger) -> dict[str, Any]:
    """Return how far a run is.

    It has the units ``done`` of ``all``, ``per_hour`` and ``hours_left`` by the last hundred, ``failed``, ``quarantined``,
    ``running``, and ``killed``, the units whose process is no more.
    """
    units = [unit for chain in chains_of(ledger.manifest) for unit in chain]
    marks = ledger.in_work()
    done = [unit for unit in units if ledger.done(unit)]
    stamps = sorted((ledger.folder / "units" / f"{unit.identity}.json").stat().st_mtime for unit in done)[-100:]
    span = stamps[-1] - stamps[0] if len(stamps) > 1 else 0.0
    rate = 3600 * (len(stamps) - 1) / span if span else None
    return {
        "done": len(done),
        "all": len(units),
        "per_hour": rate,
        "hours_left": (len(units) - len(done)) / rate if rate else None,
        "failed": [
            {"unit": Unit.of(entry["unit"]).name, "failures": entry["failures"], "error": entry["error"]}
            for entry in ledger.failed()
        ],
        "quarantined": ledger.quarantined(),
        "running": [Unit.of(mark["unit"]).name for mark in marks if mark["alive"]],
        "killed": [Unit.of(mark["unit"]).name for mark in marks if not mark["alive"]],
    }
