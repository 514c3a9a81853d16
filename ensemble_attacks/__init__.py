"""Attacks that tell the truth about ensemble defenses, alongside torchattacks, AutoAttack and RobustBench."""

from ensemble_attacks.apgd import APGD
from ensemble_attacks.ensembles import Ensemble, as_ensemble
from ensemble_attacks.errors import AggregateMismatchError, NotAnEnsembleError, OutOfBallError, WeightsError
from ensemble_attacks.judge import Judgement, judge
from ensemble_attacks.mora import MORA

__all__ = [
    "APGD",
    "AggregateMismatchError",
    "Ensemble",
    "Judgement",
    "MORA",
    "NotAnEnsembleError",
    "OutOfBallError",
    "WeightsError",
    "as_ensemble",
    "judge",
]
__version__ = "0.1.0"
