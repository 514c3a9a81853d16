"""Attacks that tell the truth about ensemble defenses, alongside torchattacks, AutoAttack and RobustBench."""

from typing import Any

from ensemble_attacks.a3 import A3
from ensemble_attacks.apgd import APGD
from ensemble_attacks.arc import ARC
from ensemble_attacks.bpda import BPDAIdentity
from ensemble_attacks.caa import CAA
from ensemble_attacks.crossmax import CrossMaxTransfer
from ensemble_attacks.ensembles import Ensemble, as_ensemble
from ensemble_attacks.eot import EOTAPGD
from ensemble_attacks.errors import (
    AggregateMismatchError,
    LedgerError,
    NotAnEnsembleError,
    OutOfBallError,
    PartError,
    WeightsError,
)
from ensemble_attacks.judge import Judgement, judge
from ensemble_attacks.lafeat import LAFEAT
from ensemble_attacks.mora import MORA
from ensemble_attacks.pgd import PGD
from ensemble_attacks.reversal import FrontEndReversal
from ensemble_attacks.surrogates import Expected, Surrogate, ZeroOrder

__all__ = [
    "A3",
    "APGD",
    "ARC",
    "AggregateMismatchError",
    "AutoAttack",
    "BPDAIdentity",
    "CAA",
    "CrossMaxTransfer",
    "EOTAPGD",
    "Ensemble",
    "Expected",
    "FrontEndReversal",
    "Judgement",
    "LAFEAT",
    "LedgerError",
    "MORA",
    "NotAnEnsembleError",
    "OutOfBallError",
    "PGD",
    "PartError",
    "Surrogate",
    "WeightsError",
    "ZeroOrder",
    "as_ensemble",
    "judge",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """AutoAttack is imported when it is asked for, as it needs the original to be installed."""
    if name == "AutoAttack":
        from ensemble_attacks.autoattack import AutoAttack

        return AutoAttack
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
