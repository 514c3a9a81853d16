"""Attacks that tell the truth about ensemble defenses, alongside torchattacks, AutoAttack and RobustBench."""

from ensemble_attacks.a3 import A3
from ensemble_attacks.apgd import APGD
from ensemble_attacks.caa import CAA
from ensemble_attacks.ensembles import Ensemble, as_ensemble
from ensemble_attacks.errors import AggregateMismatchError, NotAnEnsembleError, OutOfBallError, WeightsError
from ensemble_attacks.judge import Judgement, judge
from ensemble_attacks.mora import MORA
from ensemble_attacks.pgd import PGD

__all__ = [
    "A3",
    "APGD",
    "AggregateMismatchError",
    "CAA",
    "Ensemble",
    "Judgement",
    "MORA",
    "NotAnEnsembleError",
    "OutOfBallError",
    "PGD",
    "WeightsError",
    "as_ensemble",
    "judge",
]
__version__ = "0.1.0"
