"""Evaluations that lose nothing: cells (model x vote x eps x seed), in units kept by a `Ledger`.

A chain is what one task runs: all attacks of a cell on one range of images, in order. With ``cascade``, an image that an
earlier attack has fooled is not attacked again.
"""

from __future__ import annotations

import json
import logging
import time
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn

from ensemble_attacks import __version__, providers
from ensemble_attacks.autoattack import Original
from ensemble_attacks.data import load_dataset
from ensemble_attacks.ensembles import check_vote
from ensemble_attacks.errors import LedgerError, unknown_name
from ensemble_attacks.evaluation.ledger import ATTEMPTS, SUMMARY, Ledger, Result, Unit, canonical, write_whole
from ensemble_attacks.evaluation.runner import (
    Attacked,
    attack,
    check_arguments,
    judged,
    row_of,
    share_right,
    worst_case,
)
from ensemble_attacks.evaluation.suite import Settings
from ensemble_attacks.hashing import digest
from ensemble_attacks.judge import Judgement
from ensemble_attacks.prepare import prepare
from ensemble_attacks.validation import check_count

logger = logging.getLogger(__name__)
PIECE = 500  # images that are read at once
LIGHT = ("robust", "invalid", "correct", "right", "margin")  # tensors that a summary needs, not the images
DEFAULT_VOTES = ("softmax",)
CLEAN = "clean"  # the unit that judges the clean images


@dataclass(frozen=True)
class Sweep:
    """What to evaluate: every model with every vote, eps and seed.

    Attributes:
        models, votes, attacks: names.
        eps: radii, in pixel units of [0, 1].
        n: test images, in file order; ``None``: all.
        shard_size: images of every task.
        cascade: an image that an attack has fooled is not attacked by the next.
        others: as of `suite.Settings`.
    """

    models: tuple[str, ...]
    eps: tuple[float, ...]
    attacks: tuple[str, ...]
    votes: tuple[str, ...] = DEFAULT_VOTES
    dataset: str = "digits"
    norm: str = "Linf"
    seeds: tuple[int, ...] = (0,)
    n: int | None = None
    batch_size: int = 250
    shard_size: int = 250
    draws: int = 1
    eot_iter: int | None = None
    amp: bool = False
    cascade: bool = False

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """From a TOML file with these names as keys; a list may be a single value.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not TOML, an unknown key (names the nearest one), one that is missing, or a value of another type.
        """
        try:
            given = tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not TOML: {error}") from error
        return cls.of(given, str(path))

    @classmethod
    def of(cls, given: dict[str, Any], where: str) -> Sweep:
        """From names and values, as of `read`."""
        known = {field.name: field for field in fields(cls)}
        for key in given:
            if key not in known:
                raise unknown_name(f"key in {where}", key, known)
        needed = {"models", "eps", "attacks", *(key for key in given if str(known[key].type).startswith("tuple"))}
        if missing := [key for key in known if key in needed and given.get(key) in (None, [], (), "")]:
            raise ValueError(f"{where} does not say its {missing[0]}")
        values = {}
        for key, value in given.items():
            kind = str(known[key].type)
            if kind.startswith("tuple"):
                value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            wanted: dict[str, tuple[type, ...]] = {"str": (str,), "float": (float, int), "int": (int,), "bool": (bool,)}
            inner = next(name for name in wanted if name in kind)
            for one in value if isinstance(value, tuple) else (value,):
                fits = isinstance(one, wanted[inner]) and (inner == "bool" or not isinstance(one, bool))
                if not fits and not (one is None and "None" in kind):
                    raise ValueError(f"{where}: {key} holds {one!r}, which is no {inner}")
            if isinstance(value, tuple) and len(set(value)) < len(value):
                raise ValueError(f"{where}: {key} holds {next(v for v in value if value.count(v) > 1)!r} twice")
            values[key] = value
        return cls(**values)


def manifest_of(sweep: Sweep, *, model_dir: str | None, data_dir: str, download: bool = False) -> dict[str, Any]:
    """What decides a run's results, resolved: weights, images and code by their hashes. Checks everything that can be.

    Raises:
        ValueError, TypeError, FileNotFoundError: something that cannot be run.
    """
    check_count("shard_size", sweep.shard_size)
    n = len(load_dataset(sweep.dataset, data_dir=data_dir, n=sweep.n, download=download)[1])
    x, y = load_dataset(sweep.dataset, data_dir=data_dir, n=min(n, PIECE))
    weights = {}
    for vote in sweep.votes:
        check_vote(vote)
    for name in sweep.models:
        model = providers.load_model(name, model_dir, sweep.dataset, vote=sweep.votes[0])
        if sweep.votes != DEFAULT_VOTES and getattr(model, "vote", None) != sweep.votes[0]:
            raise ValueError(f"vote {sweep.votes[0]!r}: {name} has no votes to choose from: leave it out for this model")
        for eps, seed in product(sweep.eps, sweep.seeds):
            check_arguments(model, x, y, sweep.attacks, _settings(asdict(sweep) | {"eps": eps, "seed": seed}))
        weights[name] = digest(*model.state_dict().values())
    return {
        "sweep": asdict(sweep) | {"n": n},
        "weights": weights,
        "data": data_digest(sweep.dataset, data_dir, n),
        "code": code_version(),
        "places": {
            "model_dir": None if model_dir is None else str(Path(model_dir).resolve()),
            "data_dir": str(Path(data_dir).resolve()),
        },
    }


@cache
def data_digest(dataset: str, data_dir: str, n: int) -> str:
    """The hash of the first ``n`` images and their labels, read piece by piece."""
    parts = [(first, min(PIECE, n - first)) for first in range(0, n, PIECE)]
    hashes = [digest(*load_dataset(dataset, data_dir=data_dir, first=first, n=count)) for first, count in parts]
    return sha256("".join(hashes).encode()).hexdigest()


@cache
def code_version() -> str:
    """This package's version, and a hash of its sources, of the models' packages, and of the versions that they stand on."""
    modules = [provider.__file__ for provider in providers.providers() if provider.__file__]
    folders = [Path(__file__).parents[1], *(Path(file).parent for file in modules)]
    state = sha256(f"{torch.__version__} {Original.__module__} {torchattacks.__version__}".encode())
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            state.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return f"{__version__}+{state.hexdigest()[:12]}"


def _settings(cell: dict[str, Any]) -> Settings:
    return Settings(**{field.name: cell[field.name] for field in fields(Settings)})


# -- from a manifest to units


def cells_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of a run: what its units have in common."""
    sweep = manifest["sweep"]
    return [
        {
            "model": model,
            "vote": vote,
            "eps": eps,
            "seed": seed,
            **{key: sweep[key] for key in ("dataset", "norm", "n", "batch_size", "draws", "eot_iter", "amp", "cascade")},
            "weights": manifest["weights"][model],
            "data": manifest["data"],
            "code": manifest["code"],
        }
        for model, vote, eps, seed in product(sweep["models"], sweep["votes"], sweep["eps"], sweep["seeds"])
    ]


def seed_said(content: dict[str, Any]) -> str:
    """What titles of cells and units end in: ``, seed 1``; nothing of the seed 0."""
    return f", seed {content['seed']}" if content["seed"] else ""


def chains_of(manifest: dict[str, Any]) -> list[list[Unit]]:
    """The units, by the task that runs them: the clean images first, then the attacks in order."""
    sweep = manifest["sweep"]
    names = [CLEAN, *sweep["attacks"]]
    starts = range(0, sweep["n"], sweep["shard_size"])
    chains = []
    for cell, start in product(cells_of(manifest), starts):
        span = [start, min(start + sweep["shard_size"], sweep["n"])]
        before = [names[:index] if sweep["cascade"] else [] for index in range(len(names))]
        chains.append(
            [Unit({**cell, "attack": name, "before": b, "range": span}) for name, b in zip(names, before, strict=True)]
        )
    return chains


def run_chain(folder: str, index: int, device: str = "cpu") -> list[str]:
    """Run what is not done of one chain; returns the names of units that were given up."""
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
            if unit.content["cascade"]:
                break  # what follows depends on it
        else:
            right = result.tensors["right"] if right is None else right.minimum(result.tensors["right"])
    return given_up


class Context:
    """What the units of a chain share: the model, its twin and the images of the range.

    Raises:
        LedgerError: code (unless another will do), weights or images are not those that the run began with.
    """

    def __init__(self, manifest: dict[str, Any], unit: Unit, device: str, *, same_code: bool = True) -> None:
        content, places = unit.content, manifest["places"]
        if same_code and content["code"] != code_version():
            raise LedgerError(
                f"the run began with code {content['code']}, this is {code_version()}: install that, or begin anew"
            )
        self.model = providers.load_model(
            content["model"], places["model_dir"], content["dataset"], vote=content["vote"]
        ).to(device)
        if digest(*self.model.state_dict().values()) != content["weights"]:
            raise LedgerError(f"the weights of {content['model']} are not those that the run began with: restore them")
        if data_digest(content["dataset"], places["data_dir"], content["n"]) != content["data"]:
            raise LedgerError(f"{content['dataset']} in {places['data_dir']} is not what the run began with: restore it")
        start, stop = content["range"]
        self.x, self.y = load_dataset(content["dataset"], data_dir=places["data_dir"], first=start, n=stop - start)
        self.settings = _settings(content)
        self.twin: nn.Module = prepare(self.model, self.x[:8].to(device), amp=self.settings.amp)


def _run_unit(ledger: Ledger, unit: Unit, context: Context, right: Tensor | None) -> Result:
    """Run one unit; ``right`` is every sample's share of right draws under the attacks before it."""
    x, y, settings, name = context.x, context.y, context.settings, unit.content["attack"]
    rows = torch.arange(len(x))
    if unit.content["cascade"] and right is not None:
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
    shares[rows] = found.minimum(before[rows]) if unit.content["before"] else found
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
        "batch_size": done.batch_size,
        "finished": time.time(),
        "torch": torch.__version__,
    }
    return ledger.write(unit, tensors, info)


def _judged_in_place(context: Context, rows: Tensor, images: Tensor, batch_size: int) -> Judgement:
    """The verdict on the images of some ``rows``, judged among the whole range: the draws of a random model follow the place
    in the batch, and only where they are the same is the worst case over attacks no luckiest draw.
    """
    whole = context.x.clone().to(images)
    whole[rows] = images
    verdict = judged(context.model, context.x, context.y, whole, replace(context.settings, batch_size=batch_size))
    parts = (verdict.robust, verdict.fooled, verdict.invalid, verdict.correct, verdict.margin)
    return Judgement(*(part[..., rows] for part in parts))


# -- from units to a summary


def summarise(ledger: Ledger) -> dict[str, Any]:
    """Read all units and write ``summary.json``: what was found, and nothing that another run of the same would change."""
    cells = []
    for cell, chains in _by_cell(ledger.manifest):
        shown = {key: value for key, value in cell.items() if key not in ("code", "batch_size")}
        cells.append({**shown, **_summary_of(ledger, chains)})
    summary = {"version": __version__, "cells": cells}
    data = json.dumps(summary, indent=2).encode() + b"\n"
    path = ledger.folder / SUMMARY
    if not path.exists() or path.read_bytes() != data:
        write_whole(path, data)
    return summary


def _by_cell(manifest: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[list[Unit]]]]:
    chains, cells = chains_of(manifest), cells_of(manifest)
    shards = len(chains) // len(cells)
    for index, cell in enumerate(cells):
        yield cell, chains[index * shards : (index + 1) * shards]


def _summary_of(ledger: Ledger, chains: list[list[Unit]]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    missing: list[str] = []
    rights: list[Tensor] = []
    for units in zip(*chains, strict=True):
        results = [_light(ledger.read(unit)) for unit in units]
        missing += [unit.name for unit, result in zip(units, results, strict=True) if result is None]
        there = [result for result in results if result is not None]
        if len(there) == len(results):
            rows[units[0].content["attack"]] = _row(there, units[0].content["cascade"])
            rights.append(torch.cat([result.tensors["right"] for result in there]))
    clean = rows.pop(CLEAN, None)
    summary: dict[str, Any] = {"clean": clean, "attacks": rows}
    if rights:
        summary["worst_case"] = worst_case(torch.stack(rights).amin(0))
    return summary | ({"missing": missing} if missing else {})


def _light(result: Result | None) -> Result | None:
    if result is None:
        return None
    kept = {key: value.clone() for key, value in result.tensors.items() if key in LIGHT or key.startswith("stage ")}
    return Result(kept, result.info)


def _row(results: list[Result], cascade: bool) -> dict[str, Any]:
    joined = {key: torch.cat([r.tensors[key] for r in results], -1) for key in LIGHT}
    robust, invalid = joined["robust"].bool(), joined["invalid"].bool()
    forwards, backwards = (sum(result.info[kind] for result in results) for kind in ("forwards", "backwards"))
    outside = sum(result.info.get("outside", 0) for result in results)
    if cascade:  # robust under this attack and all before it
        right = joined["right"]
        n = len(right)
        row = worst_case(right) | {"attacked": len(robust), "invalid": int(invalid.sum())}
        row |= {"outside": outside} if outside else {}
        return row | {"forwards_per_image": forwards / n, "backwards_per_image": backwards / n}
    judgement = Judgement(robust, ~robust & ~invalid, invalid, joined["correct"].bool(), joined["margin"])
    stages: dict[str, tuple[Tensor, int, int]] = {}
    order = merged(list(result.info["stages"]) for result in results)
    for index, part in enumerate(order):
        last = [_until(result.info["stages"], order[: index + 1]) for result in results]
        flags = torch.cat([result.tensors[f"stage {at}"] for result, at in zip(results, last, strict=True)])
        ahead, back = (sum(r.info["stages"][at][k] for r, at in zip(results, last, strict=True)) for k in (0, 1))
        stages[part] = (flags.bool(), ahead, back)
    return row_of(judgement, stages, forwards, backwards, outside)


def merged(lists: Iterable[list[str]]) -> list[str]:
    """Every name once, each behind those that it is behind in its own list."""
    order: list[str] = []
    for names in lists:
        at = 0
        for name in names:
            if name not in order:
                order.insert(at, name)
            at = order.index(name) + 1
    return order


def _until(stages: dict[str, Any], parts: list[str]) -> str:
    """The last of these parts that was run, as a range may have skipped some; its first one if none of them was."""
    return next((part for part in reversed(parts) if part in stages), next(iter(stages)))


def warn_of_code(ledger: Ledger) -> None:
    """Say so where a run began with other code than this, which may judge it all the same."""
    if (code := ledger.manifest["code"]) != code_version():
        logger.warning(
            "the run began with code %s, this is %s: what is computed now may differ from it", code, code_version()
        )


def verify(
    ledger: Ledger, device: str = "cpu", *, data_dir: str | None = None, model_dir: str | None = None
) -> list[dict[str, Any]]:
    """Judge every stored image anew, from the model and the data alone, which may lie elsewhere by now.

    Returns:
        For each unit ``unit`` (its name), ``n``, ``robust`` (now) and ``differ``, the samples whose verdict is not the one
        stored; ``None`` for a unit that is missing or damaged.

    Raises:
        OutOfBallError: a stored image outside the ball.
    """
    findings: list[dict[str, Any]] = []
    warn_of_code(ledger)
    manifest = ledger.manifest | {"places": dict(ledger.manifest["places"])}
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
    """How far a run is: units ``done`` of ``all``, ``per_hour`` and ``hours_left`` by the last hundred, ``failed``,
    ``quarantined``, ``running``, and ``killed``, units whose process is no more.
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
            {"unit": Unit(entry["unit"]).name, "failures": entry["failures"], "error": entry["error"]}
            for entry in ledger.failed()
        ],
        "quarantined": ledger.quarantined(),
        "running": [Unit(mark["unit"]).name for mark in marks if mark["alive"]],
        "killed": [Unit(mark["unit"]).name for mark in marks if not mark["alive"]],
    }


def seconds_of(ledger: Ledger) -> dict[str, float]:
    """Seconds that each attack took in each cell, over all ranges, by ``model vote eps seed attack``."""
    spent: dict[str, float] = {}
    for unit in (unit for chain in chains_of(ledger.manifest) for unit in chain):
        if (info := ledger.info(unit)) is not None:
            key = " ".join(str(unit.content[part]) for part in ("model", "vote", "eps", "seed", "attack"))
            spent[key] = spent.get(key, 0.0) + info["seconds"]
    return spent


def run_identity(manifest: dict[str, Any]) -> str:
    """A short name for a run: its hash, apart from where things lie."""
    return sha256(canonical(manifest | {"places": None})).hexdigest()[:10]
