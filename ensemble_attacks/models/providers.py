"""Find models in the packages that register a module under the entry-point group ``ensemble_attacks.models``.

Such a module has ``list_models(dataset, model_dir) -> list[str]`` and
``load_model(name, model_dir, dataset, threat_model, *, vote)``; one that can train or convert also has ``train_model`` or
``convert``.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from types import ModuleType

from torch import nn

from ensemble_attacks.errors import WeightsError, said, unknown_name

GROUP = "ensemble_attacks.models"


def providers() -> list[ModuleType]:
    """Import the registered modules, and return them."""
    return [entry.load() for entry in entry_points(group=GROUP)]


def able_to(function: str) -> ModuleType:
    """Return the first provider that has ``function``.

    Raises:
        ValueError: Where no installed provider has it.
    """
    able = next((provider for provider in providers() if hasattr(provider, function)), None)
    if able is None:
        raise ValueError(f"no installed package can {function}: install one that registers it under {GROUP!r}")
    return able


def list_models(dataset: str | None = None, model_dir: str | None = None) -> list[str]:
    """Return the names that `load_model` knows, over all providers, of one dataset or of all."""
    return sorted({name for provider in providers() for name in provider.list_models(dataset, model_dir)})


def load_model(
    name: str, model_dir: str | None = None, dataset: str = "cifar10", threat_model: str = "Linf", *, vote: str = "softmax"
) -> nn.Module:
    """Load a model from the first provider that lists ``name``; a name of the form ``kind:name`` goes to the first provider.

    Args:
        name: a name that `list_models` returns, or one of the form ``kind:name``.
        model_dir: a folder of further models; ``None``: only those that the providers ship.
        dataset: the dataset whose images the model takes.
        threat_model: the norm that the model was trained against.
        vote: how the members of an ensemble are put together, a key of ``VOTES``.

    Returns:
        The model: images (N, C, H, W) in [0, 1] -> scores (N, K).

    Raises:
        ValueError: Where no provider knows the model; the message names the nearest one.
        ValueError, FileNotFoundError, ImportError: As the provider raises them.
        WeightsError: Where it cannot be loaded, whatever else a provider, a host's loader or a download raised.
    """
    for provider in providers():
        if ":" in name or name in provider.list_models(dataset, model_dir):
            try:
                return provider.load_model(name, model_dir, dataset, threat_model, vote=vote)
            except UnicodeError as error:  # a ValueError that names no file
                raise _not_loaded(name, model_dir, error) from error
            except (ValueError, FileNotFoundError, ImportError):
                raise
            except (Exception, SystemExit) as error:  # of a download, a damaged file, weights that do not fit, ...
                raise _not_loaded(name, model_dir, error) from error
    raise unknown_name(f"model for {dataset}", name, list_models(dataset, model_dir))


def _not_loaded(name: str, model_dir: str | None, error: BaseException) -> WeightsError:
    place = "" if model_dir is None else f" from model_dir {str(model_dir)!r}"
    return WeightsError(
        f"model {name!r} cannot be loaded{place} ({said(error)}): fetch its weights again, or name another model"
    )
