"""Evaluate ensemble defenses with attacks that tell the truth, alongside torchattacks, AutoAttack and RobustBench.

Names are imported when they are first asked for, so that the command line answers without torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ensemble_attacks.version import __version__ as __version__

if TYPE_CHECKING:
    from ensemble_attacks.attacks.a3 import A3 as A3
    from ensemble_attacks.attacks.apgd import APGD as APGD
    from ensemble_attacks.attacks.apgd import EOTAPGD as EOTAPGD
    from ensemble_attacks.attacks.arc import ARC as ARC
    from ensemble_attacks.attacks.bpda import BPDAIdentity as BPDAIdentity
    from ensemble_attacks.attacks.caa import CAA as CAA
    from ensemble_attacks.attacks.crossmax_transfer import CrossMaxTransfer as CrossMaxTransfer
    from ensemble_attacks.attacks.lafeat import LAFEAT as LAFEAT
    from ensemble_attacks.attacks.lca import LCA as LCA
    from ensemble_attacks.attacks.malt import MALT as MALT
    from ensemble_attacks.attacks.minimal import MinimalNorm as MinimalNorm
    from ensemble_attacks.attacks.mora import MORA as MORA
    from ensemble_attacks.attacks.pgd import PGD as PGD
    from ensemble_attacks.attacks.pma import PMA as PMA
    from ensemble_attacks.attacks.reversal import FrontEndReversal as FrontEndReversal
    from ensemble_attacks.errors import AggregateMismatchError as AggregateMismatchError
    from ensemble_attacks.errors import LedgerError as LedgerError
    from ensemble_attacks.errors import NotAnEnsembleError as NotAnEnsembleError
    from ensemble_attacks.errors import OutOfBallError as OutOfBallError
    from ensemble_attacks.errors import PartError as PartError
    from ensemble_attacks.errors import WeightsError as WeightsError
    from ensemble_attacks.evaluation.own import evaluate as evaluate
    from ensemble_attacks.evaluation.own import verify as verify
    from ensemble_attacks.hosts.autoattack import AutoAttack as AutoAttack
    from ensemble_attacks.judge import Judgement as Judgement
    from ensemble_attacks.judge import judge as judge
    from ensemble_attacks.models.adopting import as_ensemble as as_ensemble
    from ensemble_attacks.models.ensembles import Ensemble as Ensemble
    from ensemble_attacks.models.surrogates import Expected as Expected
    from ensemble_attacks.models.surrogates import Surrogate as Surrogate
    from ensemble_attacks.models.surrogates import ZeroOrder as ZeroOrder
    from ensemble_attacks.norms import Box as Box

_HOMES = {  # of every public name, the module that defines it
    "A3": "attacks.a3",
    "APGD": "attacks.apgd",
    "ARC": "attacks.arc",
    "AggregateMismatchError": "errors",
    "AutoAttack": "hosts.autoattack",
    "BPDAIdentity": "attacks.bpda",
    "Box": "norms",
    "CAA": "attacks.caa",
    "CrossMaxTransfer": "attacks.crossmax_transfer",
    "EOTAPGD": "attacks.apgd",
    "Ensemble": "models.ensembles",
    "Expected": "models.surrogates",
    "FrontEndReversal": "attacks.reversal",
    "Judgement": "judge",
    "LAFEAT": "attacks.lafeat",
    "LCA": "attacks.lca",
    "LedgerError": "errors",
    "MALT": "attacks.malt",
    "MORA": "attacks.mora",
    "MinimalNorm": "attacks.minimal",
    "NotAnEnsembleError": "errors",
    "OutOfBallError": "errors",
    "PGD": "attacks.pgd",
    "PMA": "attacks.pma",
    "PartError": "errors",
    "Surrogate": "models.surrogates",
    "WeightsError": "errors",
    "ZeroOrder": "models.surrogates",
    "as_ensemble": "models.adopting",
    "evaluate": "evaluation.own",
    "judge": "judge",
    "verify": "evaluation.own",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


class _Package(ModuleType):
    """A module type in which ``judge`` is the function, also once the module of that name has been imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.judge if name == "judge" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
