"""Examine a bundle, ours or anybody's: what it says, computed anew from its images, the model and the data alone."""

from __future__ import annotations

import random
import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.data import numbers_of, open_dataset
from ensemble_attacks.evaluation.chains import Context, run_unit
from ensemble_attacks.evaluation.external import MISSING, TEXT, heading, identified, worst_images
from ensemble_attacks.evaluation.ledger import Result
from ensemble_attacks.evaluation.manifest import data_digest
from ensemble_attacks.evaluation.origins import check_fit, check_origin, images_of
from ensemble_attacks.evaluation.recraft import unequal
from ensemble_attacks.evaluation.report.tables import in_markdown
from ensemble_attacks.evaluation.summary import Standing, verdict_of
from ensemble_attacks.evaluation.units import cells_of, chain_of, count_chains, threat_of
from ensemble_attacks.files import digest
from ensemble_attacks.judge import Judgement, judge
from ensemble_attacks.threat import number

NOT_VERIFIABLE = (
    "the accuracy under each attack by itself, AutoAttack's (autoattack_acc, unreliable) too, what the attacks spent, and "
    "the run's digest: of every sample, one image is there",
    "that the images are the worst that the attacks of these names find, and no weaker ones: "
    "--recraft N crafts N units anew, where the bundle says of which run it is",
)


@dataclass(frozen=True)
class Claim:
    """What is claimed of a bundle's images: by whoever passes it, else by the bundle."""

    model: str
    vote: str
    dataset: str
    norm: str
    eps: float
    draws: int
    transform: str


def examine_bundle(
    images: Tensor,
    about: dict[str, Any],
    claim: Claim,
    manifest: dict[str, Any] | None,
    model: nn.Module,
    data_dir: str,
    text: str | None = None,
) -> tuple[Judgement, list[str]]:
    """Return the judge's verdict on a bundle's images, and a line for each thing that the bundle says otherwise.

    Args:
        images, about: as `external.read_bundle` returns them.
        claim: what they are judged by.
        manifest: of the run that the bundle was exported from (`external.run_of`), if it says, placed where model and data
            lie by now.
        model: the model of the claim.
        data_dir: where the data lie.
        text: what the bundle says in words (`external.text_of`), which is compared where it is of a run.
    """
    span = threat_of(manifest or {}).box.span
    opened = open_dataset(claim.dataset, data_dir=data_dir, transform=claim.transform, span=span)
    x, y = opened.take(numbers_of(opened, range(len(opened)), len(images)))
    check_fit(claim.model, model, x, y, claim.dataset, opened.classes)
    threat = threat_of(manifest or {})
    given: dict[str, Any] = {"eps": threat.eps(claim.eps), "norm": claim.norm, "draws": claim.draws}
    given |= {"box": threat.box, "mask": threat.mask}
    sweep = manifest["sweep"] if manifest else {"shard_size": len(images), "batch_size": 250}
    given["batch_size"] = sweep["batch_size"]
    parts = [(x, y, images), (x, y, x)]
    verdict, clean = (_judged_by_ranges(model, *part, sweep["shard_size"], given) for part in parts)
    lines = []
    if claim.draws == 1 or manifest is not None:  # else the draws of a random model have other places
        for key, judgement in (("external", verdict), ("clean_acc", clean)):
            said, anew = about.get(key), 100 * judgement.accuracy
            if said is not None and f"{anew:.2f}" != _percent(said):
                lines.append(f"{key} = {said}, computed anew {anew:.2f}")
    if about.get("n_examples", len(images)) != len(images):
        lines.append(f"n_examples = {about['n_examples']}, there are {len(images)} images")
    lines += _of_the_suite(about, 100 * verdict.accuracy)
    if manifest is not None:
        lines += _of_another_run(manifest, claim, model, len(images))
        cell, shares = cells_of(manifest)[0].listed, (100 * clean.accuracy, 100 * verdict.accuracy)
        due = {key: value for key, value in identified(cell, *shares).items() if key in about}
        due = {key: value for key, value in due.items() if _otherwise(key, about[key], value)}
        lines += [f"{key} = {about[key]!r}, of its run it is {value!r}" for key, value in due.items()]
        lines += [] if text is None else _of_text(text, heading(manifest, cell, *shares), manifest)
    return verdict, lines


def _otherwise(key: str, said: Any, due: Any) -> bool:
    """Tell whether a bundle says another thing than is due; of a radius, whether it is another number (1/10 is 0.1)."""
    if key == "eps" and said != due:
        with suppress(ValueError, TypeError):
            return number(said) != number(due)
    return bool(said != due)


def _of_the_suite(about: dict[str, Any], accuracy: float) -> list[str]:
    """Return what is impossible in what a bundle says of AutoAttack: the worst case is no higher, and decides the rest."""
    suite, unreliable = about.get("autoattack_acc"), bool(about.get("unreliable"))
    share = accuracy if suite is None else float(_percent(suite))
    if not share > accuracy - 0.01:
        return [f"autoattack_acc = {suite}, but the worst case is {accuracy:.2f}"]
    if unreliable != (share - accuracy > 0.1):
        return [f"unreliable = {about.get('unreliable')}, by its own autoattack_acc it is {not unreliable}"]
    return []


def _of_text(text: str, head: str, manifest: dict[str, Any]) -> list[str]:
    """Return what a bundle's text has otherwise than its run: the words before the attacks, their names, what follows."""
    said, due = text.splitlines(), head.splitlines()
    for found, line in zip_longest(said[: len(due)], due, fillvalue=""):
        if found != line:
            return [f"{TEXT}: {found.strip()[:100]!r}, the run says {line.strip()[:100]!r}"]
    rest = "\n".join(said[len(due) :])
    names, figure = [re.escape(in_markdown(name)) for name in manifest["sweep"]["attacks"]], r"( \(.*\))?: \d{1,3}\.\d\d%\n"
    if manifest.get(MISSING):
        listed = "".join(rf"(- {name}{figure})?" for name in names) + r"(\nNot complete: .*\.\n)*"
    else:
        listed = "".join(rf"- {name}{figure}" for name in names)
    sound = re.fullmatch(listed + "Run: digest [0-9a-f]{32}", rest)
    return [] if sound else [f"{TEXT} does not list the run's attacks, each with its accuracy, and its digest, and no more"]


def _percent(said: object) -> str:
    try:
        return f"{float(str(said)):.2f}"
    except ValueError:
        return "nan"


def _judged_by_ranges(model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, size: int, given: dict[str, Any]) -> Judgement:
    """Return the verdict, range by range, as the run judged: the draws of a random model follow the place in the range."""
    ranges = zip(x.split(size), y.split(size), x_adv.split(size), strict=True)
    verdicts = [judge(model, *part, **given) for part in ranges]
    names = ("robust", "fooled", "invalid", "correct", "margin")
    return Judgement(*(torch.cat([getattr(verdict, name) for verdict in verdicts], -1) for name in names))


def _of_another_run(manifest: dict[str, Any], claim: Claim, model: nn.Module, n: int) -> list[str]:
    """Return what the run, of which the bundle says it is, has otherwise than what it is judged by.

    Model and data may be called otherwise by now: it is their content that counts.
    """
    sweep, (name, *others) = manifest["sweep"], manifest["sweep"]["models"]
    given: dict[str, Any] = {"votes": [claim.vote], "norm": claim.norm, "eps": [claim.eps], "draws": claim.draws, "n": n}
    given |= {"transform": claim.transform}
    lines = [f"run.json: {key} = {sweep[key]!r}, not {value!r}" for key, value in given.items() if sweep[key] != value]
    if others or manifest["rows"] is not None:
        lines.append("run.json: it is of several models, or of a choice of images: a bundle is of one, and of the first")
    check_origin(manifest, name, model, same_code=False)
    if digest(*model.state_dict().values()) != manifest["weights"][name]:
        lines.append(f"run.json: the weights of {name} are not those of {claim.model}")
    if not lines and data_digest(images_of(manifest), n) != manifest["data"]:
        lines.append(f"run.json: the images of {sweep['dataset']} are not those of {claim.dataset}")
    return lines


def recraft_bundle(manifest: dict[str, Any], images: Tensor, device: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Return, for ranges drawn by ``seed``, what differs when all attacks of the run are run on them anew.

    Args:
        manifest: of the run, placed where model and data lie by now.
        images: the bundle's.
        device: where the model is asked.
        count: the number of units, at least; the units of a range are crafted together.

    Raises:
        LedgerError: Where weights or images are not those of the run.
    """
    chains, attacks = count_chains(manifest), len(manifest["sweep"]["attacks"])
    drawn = sorted(random.Random(seed).sample(range(chains), min(-(-count // attacks), chains)))
    findings = []
    for index in drawn:
        chain = chain_of(manifest, index)
        (start, stop), results = chain[0].range, []
        context, standing = Context(manifest, chain[0], device, same_code=False), Standing.of(stop - start)
        for unit in chain:
            if unit.name in manifest.get(MISSING, []):
                continue
            result = Result(*run_unit(unit, context, standing))
            standing = standing.after(result.tensors["rows"], verdict_of(result))
            results.append(result)
        differ = unequal(images[start:stop], worst_images(results).to(images.dtype))
        what = [f"{differ} of {stop - start} images are not those that the attacks make"] if differ else []
        name = f"images {start}-{stop}, {len(results) - 1} attacks, crafted anew"
        robust = int((standing.right > 0.5).sum())
        findings.append({"unit": name, "n": stop - start, "robust": robust, "differ": differ, "what": what})
    return findings
