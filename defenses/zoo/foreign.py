"""Make ensembles of anybody's models: of this package, of RobustBench's zoo, of timm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from defenses.architectures import Normalize
from ensemble_attacks.data import DATASETS
from ensemble_attacks.errors import WeightsError, said, unknown_name
from ensemble_attacks.files import load_tensors, plain_objects
from ensemble_attacks.models.ensembles import Ensemble


def ensemble_of(
    names: list[str],
    own: Mapping[str, Callable[[], nn.Module]],
    *,
    model_dir: str | Path | None,
    dataset: str,
    threat_model: str,
    vote: str,
) -> Ensemble:
    """Return the models of these names, voting together, in eval mode.

    Args:
        names: names of this package's models (``own``, by name), of RobustBench's zoo, or ``timm/<name>``.
        own: the functions that load this package's models, by name.
        model_dir: where RobustBench keeps its checkpoints; ``None`` is its default, ``models``.
        dataset, threat_model: names.
        vote: the ensemble's vote.

    Raises:
        ValueError: Where there are fewer than two names, one that nobody knows, a member that does not take the dataset's
            images, or members with different classes.
    """
    if len(names) < 2 or not all(names):
        raise ValueError(
            f"{'ensemble:' + '+'.join(names)!r}: name at least two models, as in 'ensemble:Standard+Rice2020Overfitting'"
        )
    members: list[nn.Module] = []
    for name in names:
        if name.startswith("timm/"):
            members.append(_timm(name.removeprefix("timm/")))
        elif name in own:
            members.append(own[name]())
        else:
            members.append(_robustbench(name, model_dir, dataset, threat_model, own))
    classes = {name: _classes(name, member.eval(), dataset) for name, member in zip(names, members, strict=True)}
    if len(set(classes.values())) > 1:
        raise ValueError(f"the members of an ensemble must have the same classes, but these have {classes}")
    return Ensemble(members, vote).eval()


def model_of(name: str, *, model_dir: str | Path | None, dataset: str, threat_model: str) -> nn.Module:
    """Return a single model, in eval mode: ``robustbench:<name>`` of RobustBench's zoo, or ``timm:<name>``.

    Raises:
        ValueError: Where the zoo knows no such model (the message names the nearest one), or it does not take the dataset's
            images.
    """
    zoo, _, theirs = name.partition(":")
    net = _timm(theirs) if zoo == "timm" else _robustbench(theirs, model_dir, dataset, threat_model)
    _classes(name, net.eval(), dataset)
    return net


@torch.no_grad()
def _classes(name: str, net: nn.Module, dataset: str) -> int:
    """Return how many classes a network has; raise a `ValueError` if it does not take a dataset's images."""
    shape = DATASETS[dataset].shape
    try:
        return net(torch.zeros(1, *shape)).shape[-1]
    except Exception as error:  # anybody's network fails in its own way
        raise ValueError(f"model {name!r} does not take the {shape} images of {dataset}: {said(error)}") from None


def _timm(name: str) -> nn.Module:
    """Return a pretrained timm model that takes images in [0, 1].

    Raises:
        ValueError: Where timm knows no such model; the message names the nearest one.
        WeightsError: Where it cannot be built with its published weights, whatever timm or the download raised.
    """
    import timm

    if not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models())
    try:
        net = timm.create_model(name, pretrained=True)
    except (Exception, SystemExit) as error:
        raise WeightsError(
            f"timm's model {name!r} cannot be built with its published weights ({said(error)}): try again online, or "
            "put them into timm's cache (HF_HOME, TORCH_HOME) first"
        ) from error
    return nn.Sequential(Normalize(net.default_cfg["mean"], net.default_cfg["std"]), net)


def _robustbench(
    name: str, model_dir: str | Path | None, dataset: str, threat_model: str, own: Iterable[str] = ()
) -> nn.Module:
    from ensemble_attacks.robustbench import ensure

    ensure()
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    from robustbench.model_zoo.models import model_dicts
    from robustbench.utils import load_model

    datasets = {member.value for member in BenchmarkDataset}
    zoo = model_dicts[BenchmarkDataset(dataset)][ThreatModel(threat_model)] if dataset in datasets else {}
    if name not in zoo:
        raise unknown_name(f"model for {dataset}, here and in RobustBench's zoo,", name, {*own, *zoo})
    place = Path(model_dir or "models")
    try:
        with plain_objects():
            return load_model(name, model_dir=str(place), dataset=dataset, threat_model=threat_model)
    except (Exception, SystemExit) as error:
        raise WeightsError(
            f"RobustBench's model {name!r} cannot be loaded: {_fault(place / dataset / threat_model / f'{name}.pt', error)}"
        ) from error


def _fault(path: Path, error: BaseException) -> str:
    """Return what is wrong with the files of a model in RobustBench's zoo, which could not be loaded, and the remedy."""
    files = [file for file in sorted(path.parent.glob(f"{path.name}*")) if file.is_file()]
    if not files:
        return f"{path} could not be fetched ({said(error)}): try again later, or put the weights there by hand"
    for file in files:
        try:
            with file.open("rb") as content:
                page = content.read(64).lstrip().startswith(b"<")
            reason = "it is a web page, such as one that tells of a quota" if page else ""
            if not page:
                load_tensors(file)
        except (ValueError, OSError) as damage:
            reason = str(damage)
        if reason:
            return f"{file} holds no weights ({reason}): remove it, and fetch it again, or put the weights there by hand"
    return f"{', '.join(map(str, files))}: {said(error)}: remove what is not this model's, and fetch it again"
