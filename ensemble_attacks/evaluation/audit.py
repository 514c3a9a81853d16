"""Look at a run from outside: how far it is, and whether all that it says follows from its images."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ensemble_attacks.errors import OutOfBallError
from ensemble_attacks.evaluation.chains import Context, judged_in_place, verdict_tensors
from ensemble_attacks.evaluation.ledger import MANIFEST, SUMMARY, Ledger, Result
from ensemble_attacks.evaluation.manifest import warn_of_code
from ensemble_attacks.evaluation.origins import placed_anew
from ensemble_attacks.evaluation.recraft import recraft_units
from ensemble_attacks.evaluation.runner import in_dispute
from ensemble_attacks.evaluation.selection import choice_of
from ensemble_attacks.evaluation.summary import Standing, summary_bytes, summary_of, verdict_of
from ensemble_attacks.evaluation.units import CLEAN, Cell, Unit, by_cell, chain_of, count_chains
from ensemble_attacks.files import read_whole
from ensemble_attacks.models.gradients import zero_gradients
from ensemble_attacks.schema import parse

NOT_VERIFIABLE = (
    "passes, seconds, traces, what was put back into the ball, which parts of a suite failed, and images that an attack saw "
    "fooled, but not the judge: only who ran them knows",
    "the robust counts after the parts of a suite, beyond that they fall, and end no lower than what the judge finds",
    "that the images are those that the attacks of these names make, and no weaker ones: --recraft N crafts N units anew",
)
CLOSE = 1e-3  # of margins, relative to their size or 1: another machine rounds otherwise
MOST_LINES = 40  # of differences in one file
Finding = dict[str, Any]


def verify(
    ledger: Ledger,
    device: str = "cpu",
    *,
    data_dir: str | None = None,
    model_dir: str | None = None,
    model: str | None = None,
    dataset: str | None = None,
    recraft: int = 0,
    seed: int = 0,
) -> list[Finding]:
    """Compute anew, from the images, the model and the data alone, all that a run says that follows from them.

    Model and data may lie elsewhere by now; the ledger knows afterwards where.

    Args:
        ledger: the run; nothing in its folder is written.
        device: where the model is asked.
        data_dir, model_dir: where data and models lie by now; ``None``: where they lay.
        model, dataset: names that the run's model and data have by now; ``None``: theirs.
        recraft: the number of units, drawn by ``seed``, whose images are crafted anew and compared bit for bit.

    Returns:
        For each unit, for the choice of images in ``manifest.json``, and for ``summary.json``, ``unit`` (its name), ``n``,
        ``robust`` (now), ``differ``, the number of values that are not those stored, and ``what``, a line for each kind of
        them. ``differ`` is ``None`` for what is missing or damaged.

    Raises:
        LedgerError: Where a model's source, its weights or the images are not those that the run began with.
    """
    warn_of_code(ledger)
    ledger.manifest = placed_anew(ledger.manifest, model, dataset)
    ledger.manifest["places"] |= {k: v for k, v in (("data_dir", data_dir), ("model_dir", model_dir)) if v is not None}
    findings: list[Finding] = []
    sound: dict[str, Result] = {}
    context: Context | None = None
    for index in range(count_chains(ledger.manifest)):
        chain = chain_of(ledger.manifest, index)
        standing, complete = Standing.of(chain[0].range[1] - chain[0].range[0]), True
        context = Context(ledger.manifest, chain[0], device, same_code=False, like=context)
        for unit in chain:
            finding, result = _examined(ledger, unit, context, standing) if complete else (_lacking(unit, AFTER), None)
            findings.append(finding)
            if result is not None:
                sound[unit.identity] = result
                standing = standing.after(result.tensors["rows"], verdict_of(result))
            elif unit.cell.cascade:
                complete = False  # what follows depends on it
    findings += [_examined_choice(ledger), _examined_summary(ledger, sound)]
    return findings + recraft_units(ledger, sound, device, recraft, seed)


AFTER = "not examined: it follows, in a cascade, what is missing or damaged"


def _lacking(unit: Unit, why: str) -> Finding:
    return {"unit": unit.name, "n": 0, "robust": 0, "differ": None, "what": [why]}


def _examined(ledger: Ledger, unit: Unit, context: Context, standing: Standing) -> tuple[Finding, Result | None]:
    """Return what is found of one unit, and its result as it should be; ``None`` where its images are not all those due."""
    try:
        stored = ledger.examine(unit)
    except FileNotFoundError as error:
        return _lacking(unit, "missing" if not ledger.done(unit) else f"missing: {error.filename}"), None
    except ValueError as error:
        return _lacking(unit, f"damaged: {error}"), None
    rows, images = stored.tensors["rows"], stored.tensors["x_adv"]
    if images.shape[1:] != context.x.shape[1:]:
        return _lacking(
            unit, f"its images are {tuple(images.shape[1:])}, those of the data {tuple(context.x.shape[1:])}"
        ), None
    due = standing.left if unit.before else torch.arange(len(context.x))
    what: dict[str, int] = {}
    if not torch.equal(rows, due):
        what[f"rows are {len(rows)} samples, those due are {len(due)}"] = len(set(rows.tolist()) ^ set(due.tolist())) or 1
    what |= _numbers(unit, stored, context)
    try:
        batch = stored.info["batch_size"]
        judgement = judged_in_place(context, rows, images, batch) if len(rows) else verdict_of(stored)
    except (OutOfBallError, ValueError, TypeError) as error:
        return _lacking(unit, f"its images cannot be judged: {error}"), None
    disputed = int(in_dispute(context.model, images, judgement, context.settings).sum())
    if stored.info["disagreement"] < disputed:
        what[f"disagreement is {stored.info['disagreement']}, the model contradicts itself on {disputed} images"] = 1
    stages = {part: stored.tensors[f"stage {part}"] for part in stored.info["stages"]}
    anew = verdict_tensors(unit, rows, context.y[rows], judgement, stages, standing)
    for name, tensor in anew.items():
        if count := _differing(name, stored.tensors[name], tensor):
            what[name] = count
    what |= _stages(stages, judgement.fooled)
    finding = {"unit": unit.name, "n": len(rows), "robust": int(judgement.robust.sum()), "differ": sum(what.values())}
    lines = [f"{name}: {count} differ" for name, count in what.items()]
    return finding | {"what": lines}, Result(anew, stored.info) if torch.equal(rows, due) else None


def _differing(name: str, stored: Tensor, anew: Tensor) -> int:
    """Return the number of values that differ; of margins, which another machine rounds otherwise, by more than `CLOSE`."""
    if stored.shape != anew.shape:
        return max(stored.numel(), anew.numel(), 1)
    if name == "margin":
        return int((~torch.isclose(stored.double(), anew.double(), rtol=CLOSE, atol=CLOSE, equal_nan=True)).sum())
    return int((stored != anew).sum())


def _numbers(unit: Unit, stored: Result, context: Context) -> dict[str, int]:
    """Return what is wrong with the numbers of a unit, as far as images tell."""
    info, rows, images = stored.info, stored.tensors["rows"], stored.tensors["x_adv"]
    wrong = {}
    sizes = {unit.cell.batch_size >> halvings for halvings in range(unit.cell.batch_size.bit_length())}
    if info["batch_size"] not in sizes:
        wrong[f"batch_size {info['batch_size']} is no halving of {unit.cell.batch_size}"] = 1
    unmoved = int((images == context.x[rows].to(images)).flatten(1).all(1).sum()) if len(rows) else 0
    if info["outside"] > unmoved:
        wrong[f"outside is {info['outside']}, but only {unmoved} images are the clean ones"] = 1
    if info["disagreement"] > int(stored.tensors["robust"].sum()):
        wrong["disagreement is more than there are robust images"] = 1
    failed = info["failed"]
    if failed.keys() & info["stages"].keys():
        wrong["parts that failed and are there"] = len(failed.keys() & info["stages"].keys())
    idle = unit.attack == CLEAN or not len(rows)
    if idle and (failed or any(info[key] for key in ("forwards", "backwards", "stages", "trace", "outside"))):
        wrong["passes of a unit that attacks nothing"] = 1
    flat = 0
    if unit.attack == CLEAN:
        asked = {"batch_size": info["batch_size"], "seed": context.settings.seed}
        flat = zero_gradients(context.twin, context.x, context.y, **asked)
    if info["zero_gradients"] != flat:
        wrong[f"zero_gradients is {info['zero_gradients']}, computed anew {flat}"] = 1
    if unit.attack == CLEAN and unmoved < len(rows):
        wrong["x_adv of the clean images"] = len(rows) - unmoved
    return wrong


def _stages(stages: dict[str, Tensor], fooled: Tensor) -> dict[str, int]:
    """Return what is impossible in the robust flags after the parts of a suite: they fall, and hold whom nothing fooled."""
    wrong: dict[str, int] = {}
    before: Tensor | None = None
    for part, flags in stages.items():
        missing = int((~fooled & ~flags.bool()).sum())
        risen = 0 if before is None else int((flags.bool() & ~before).sum())
        if missing or risen:
            wrong[f"stage {part}"] = missing + risen
        before = flags.bool()
    return wrong


def _examined_choice(ledger: Ledger) -> Finding:
    """Return what is found of the images that a run says to have taken, of how many."""
    finding: Finding = {"unit": f"{MANIFEST}, the choice of images", "n": 0, "robust": 0}
    stored = {key: ledger.manifest[key] for key in ("rows", "images")}
    try:
        anew = dict(zip(stored, choice_of(ledger.manifest), strict=True))
    except ValueError as error:
        return finding | {"differ": 1, "what": [f"it cannot be made anew: {error}"]}
    lines = list(differences(stored, anew))
    return finding | {"differ": len(lines), "what": lines[:MOST_LINES]}


def _examined_summary(ledger: Ledger, sound: dict[str, Result]) -> Finding:
    """Return what is found of ``summary.json``, compared with that of the results as they should be."""
    anew = summary_of(ledger.manifest, lambda unit: sound.get(unit.identity))
    data = summary_bytes(anew)
    finding: Finding = {"unit": SUMMARY, "n": 0, "robust": 0, "differ": 0, "what": []}
    try:
        stored = read_whole(ledger.folder / SUMMARY, 2 * len(data) + (1 << 20))
        lines = [] if stored == data else list(differences(parse(stored), parse(data)))
    except FileNotFoundError:
        return finding | {"differ": None, "what": ["missing"]}
    except ValueError as error:
        return finding | {"differ": None, "what": [f"damaged: {error}"]}
    more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return finding | {"differ": len(lines), "what": lines[:MOST_LINES] + more}


def differences(stored: Any, anew: Any, where: str = "") -> Iterator[str]:
    """Yield a line for each value of two pieces of JSON that differs; numbers by more than rounding."""
    if isinstance(stored, dict) and isinstance(anew, dict):
        for key in {**anew, **stored}:
            inside = f"{where}.{key}" if where else str(key)
            if key in stored and key in anew:
                yield from differences(stored[key], anew[key], inside)
            else:
                yield f"{inside} " + ("is missing" if key in anew else f"= {str(stored[key])[:60]} does not belong there")
    elif isinstance(stored, list) and isinstance(anew, list) and len(stored) == len(anew):
        for index, pair in enumerate(zip(stored, anew, strict=True)):
            yield from differences(*pair, f"{where}[{index}]")
    elif type(stored) is float and type(anew) is float and math.isclose(stored, anew, rel_tol=1e-12, abs_tol=1e-12):
        return
    elif stored != anew or type(stored) is not type(anew):
        yield f"{where} = {str(stored)[:60]}, computed anew {str(anew)[:60]}"


def progress(ledger: Ledger) -> dict[str, Any]:
    """Return how far a run is.

    It has the units ``done`` of ``all``, ``per_hour`` and ``hours_left`` by the last hundred, ``failed``, ``quarantined``,
    ``running``, those in work with the seconds since they began, and ``killed``, the units whose process is no more; and
    ``state``: ``finished``, ``running``, ``stopped`` (nobody is at work) or ``killed`` (who was at work is no more).
    """
    units = [unit for index in range(count_chains(ledger.manifest)) for unit in chain_of(ledger.manifest, index)]
    marks, drivers = ledger.in_work(), ledger.in_work("driving")
    done = [unit for unit in units if ledger.done(unit)]
    stamps = sorted((ledger.folder / "units" / f"{unit.identity}.json").stat().st_mtime for unit in done)[-100:]
    span = stamps[-1] - stamps[0] if len(stamps) > 1 else 0.0
    rate = 3600 * (len(stamps) - 1) / span if span else None
    at_work = [mark["alive"] for mark in (*marks, *drivers)]
    state = "running" if any(at_work) else "killed" if at_work else "stopped"
    return {
        "done": len(done),
        "all": len(units),
        "state": "finished" if len(done) == len(units) else state,
        "per_hour": rate,
        "hours_left": (len(units) - len(done)) / rate if rate else None,
        "failed": [
            {"unit": unit_name(entry["unit"]), "failures": entry["failures"], "error": entry["error"]}
            for entry in ledger.failed()
        ],
        "quarantined": ledger.quarantined(),
        "running": {
            unit_name(mark["unit"]): time.time() - mark.get("since", time.time())
            for mark in marks
            if mark["alive"] and mark.get("unit")
        },
        "killed": [unit_name(mark["unit"]) for mark in marks if not mark["alive"] and mark.get("unit")],
    }


def results_so_far(ledger: Ledger) -> Iterator[tuple[Cell, dict[str, tuple[int, int]]]]:
    """Yield each cell of which something is done, with the robust images and the images that each attack has taken."""
    for cell, chains in by_cell(ledger.manifest):
        rows: dict[str, tuple[int, int]] = {}
        for unit in (unit for chain in chains for unit in chain if ledger.done(unit)):
            if (result := ledger.read(unit)) is not None:
                robust, n = rows.get(unit.attack, (0, 0))
                flags = result.tensors["robust"]
                rows[unit.attack] = (robust + int(flags.sum()), n + len(flags))
        if rows:
            yield cell, {name: row for name, row in rows.items() if row[1]}


def unit_name(content: dict[str, Any]) -> str:
    """Return the name of the unit of this content (`Unit.content`), which may be of another version."""
    start, stop = content["range"]
    seed = f" seed {content['seed']}" if content["seed"] else ""
    return f"{content['model']} {content['vote']} {content['eps']:g}{seed} {content['attack']} {start}-{stop}"
