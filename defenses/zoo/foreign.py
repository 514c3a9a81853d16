"""Load other people's models by name: RobustBench's, timm's, torchvision's, transformers', and folders of weights.

Weights are safetensors, or files of tensors: nothing is unpickled but by the libraries' own checked downloads.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from defenses.architectures import Normalize
from defenses.zoo.cards import read_card, read_model
from ensemble_attacks.data import DATASETS
from ensemble_attacks.errors import WeightsError, said, unknown_name
from ensemble_attacks.extras import extra, import_timm
from ensemble_attacks.files import check_plain, load_tensors, plain_objects, read_tensors
from ensemble_attacks.schema import Published, read_json

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation that most networks were trained with


def _normalized(net: nn.Module, mean: Any, std: Any) -> nn.Module:
    return nn.Sequential(Normalize(list(mean), list(std)), net)


def _timm(name: str, options: dict[str, Any], **_: Any) -> nn.Module:
    """Return a timm model that takes images in [0, 1]; ``weights`` is a file, or ``none``; others are timm's options."""
    timm: Any = import_timm(f"timm:{name}")
    if not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models())
    weights = options.pop("weights", None)
    try:
        net = timm.create_model(name, pretrained=weights is None, **options)
    except (Exception, SystemExit) as error:
        raise WeightsError(
            f"timm's model {name!r} cannot be built with its published weights ({said(error)}): try again online, put them "
            f"into timm's cache (HF_HOME, TORCH_HOME) first, or give a file, timm:{name}?weights=FILE"
        ) from error
    _restore(net, weights)
    about = getattr(net, "pretrained_cfg", None) or net.default_cfg  # the latter is older timm's
    return _normalized(net, about["mean"], about["std"])


def _torchvision(name: str, options: dict[str, Any], **_: Any) -> nn.Module:
    """Return a classifier of torchvision that takes images in [0, 1]; ``weights``: one of its own, a file, or ``none``."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise unknown_name("torchvision model", name, known)
    weights = options.pop("weights", "DEFAULT")
    kinds = models.get_model_weights(name)
    own = weights if weights in ("DEFAULT", *(one.name for one in kinds)) else None
    try:
        net = models.get_model(name, weights=own, **options)
    except OSError as error:
        raise ValueError(
            f"torchvision:{name} cannot be fetched ({error}): give its file, torchvision:{name}?weights=FILE"
        ) from None
    if own is None:
        _restore(net, weights)
    preset = kinds[own].transforms() if own and own != "DEFAULT" else kinds.DEFAULT.transforms()
    return _normalized(net, getattr(preset, "mean", IMAGENET[0]), getattr(preset, "std", IMAGENET[1]))


def _restore(net: nn.Module, weights: Any) -> None:
    """Load a file of weights into a network, and leave it as it is for ``none``."""
    if weights is None or str(weights).lower() == "none":
        return
    path = Path(str(weights))
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r} of weights: name a .safetensors or .pth file")
    try:
        net.load_state_dict(_tensors(path))
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path} does not fit {type(net).__name__}: {' '.join(str(error).split())[:300]}") from None


def _tensors(path: Path) -> dict[str, Tensor]:
    """Return what a file of weights, which a user names and may be a link, holds by name: dense tensors of real numbers."""
    if path.suffix == ".safetensors":
        return read_tensors(path.resolve())[0]
    content = load_tensors(path.resolve())
    content = content["state_dict"] if isinstance(content, dict) and "state_dict" in content else content
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}: expected tensors by name")
    for key, value in content.items():
        check_plain(value, str(key)[:100])
    return content


class _Logits(nn.Module):
    """A classifier of transformers as a function of images in [0, 1]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(pixel_values=x).logits


def _hf(name: str, options: dict[str, Any], **_: Any) -> nn.Module:
    """Return the image classifier in a folder as transformers saves it, ``config.json`` and ``model.safetensors``."""
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"hf:{name}: there is no {folder / 'config.json'}: name a folder that save_pretrained wrote")
    with extra("hf", f"hf:{name}"):
        transformers: Any = import_module("transformers")
    if options:
        raise unknown_name("option of hf:", next(iter(options)), ())
    _published(folder / "config.json")  # which transformers would read without a bound
    about = _published(folder / "preprocessor_config.json")
    try:
        net = transformers.AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError) as error:
        raise ValueError(f"hf:{name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if about.get("do_normalize") in (True, None):
        mean, std = (about.get(key) or (0.5,) * 3 for key in ("image_mean", "image_std"))
        return _normalized(_Logits(net), mean, std)
    return _Logits(net)


def _published(path: Path) -> dict[str, Any]:
    """Return what a file beside published weights says; empty where there is none."""
    try:
        return read_json(path.resolve(), Published)  # a snapshot of the hub is a folder of links
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise WeightsError(f"{path} cannot be read ({error}): fetch it again") from None


def load_folder(folder: Path, vote: str = "softmax") -> nn.Module:
    """Load the model in a folder: a card of ours beside its weights, timm's or transformers' ``config.json``.

    Raises:
        ValueError, WeightsError: Where the folder is none of these, or its weights do not fit.
    """
    cards = [path for path in sorted(folder.glob("*.json")) if path.with_suffix(".safetensors").is_file()]
    if len(cards) == 1 and "sha256" in _published(cards[0]):
        read_card(cards[0].with_suffix(""))
        return read_model(cards[0].with_suffix(""), vote)
    config = _published(folder / "config.json")
    if "model_type" in config or "architectures" in config:
        return _hf(str(folder), {}).eval()
    if "architecture" in config and (folder / "model.safetensors").is_file():
        options = {key: config[key] for key in ("num_classes",) if config.get(key) is not None}
        own = config.get("pretrained_cfg") or {}
        net = _timm(config["architecture"], {"weights": folder / "model.safetensors", **options})
        return _normalized(net[1], own["mean"], own["std"]).eval() if {"mean", "std"} <= set(own) else net.eval()  # type: ignore[index]
    raise ValueError(
        f"{folder} holds no model: expected one card NAME.json beside NAME.safetensors, or config.json and "
        "model.safetensors, as timm and transformers write them"
    )


def _robustbench(
    name: str,
    options: dict[str, Any],
    *,
    model_dir: str | Path | None = None,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
) -> nn.Module:
    """Return a model of RobustBench's zoo; ``threat_model`` may be an option."""
    theirs = _zoo()
    threat_model = options.pop("threat_model", threat_model)
    zoo = theirs.get(dataset, {}).get(threat_model, {})
    if name not in zoo:
        from defenses.zoo.load import list_models

        own = list_models(dataset, model_dir) if dataset in DATASETS else []
        raise unknown_name(f"model for {dataset}, here and in RobustBench's zoo,", name, {*own, *zoo})
    from robustbench.utils import load_model

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


def _zoo() -> dict[str, dict[str, Any]]:
    """Return RobustBench's models, by dataset and threat model."""
    from ensemble_attacks.robustbench import ensure

    ensure()
    from robustbench.model_zoo.models import model_dicts

    return {data.value: {threat.value: zoo for threat, zoo in of.items()} for data, of in model_dicts.items()}


def datasets_of(name: str) -> list[str]:
    """Return the datasets for which RobustBench's zoo has ``robustbench:NAME``; none of any other name."""
    if not name.startswith("robustbench:"):
        return []
    model = name.removeprefix("robustbench:").partition("?")[0]
    return [dataset for dataset, of in _zoo().items() if any(model in zoo for zoo in of.values())]


KINDS: dict[str, Callable[..., nn.Module]] = {
    "robustbench": _robustbench,
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _hf,
}
