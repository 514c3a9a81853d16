"""Find out whether a defense masks its gradients.

The checks have names, and each has a figure, threshold, verdict, source and what to run next.
"""

from ensemble_attacks.diagnostics.binarization import Binarization, binarization
from ensemble_attacks.diagnostics.checks import diagnose
from ensemble_attacks.diagnostics.examination import EOT_ITER, FEWEST_DIAGNOSED
from ensemble_attacks.diagnostics.findings import Check, Diagnosis
from ensemble_attacks.diagnostics.indicators import Indicators, indicators

__all__ = [
    "EOT_ITER",
    "FEWEST_DIAGNOSED",
    "Binarization",
    "Check",
    "Diagnosis",
    "Indicators",
    "binarization",
    "diagnose",
    "indicators",
]
