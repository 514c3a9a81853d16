"""Provide what is known of runs: what to evaluate, and what was found (`manifest`, `summary` and `audit`)."""

from ensemble_attacks.evaluation.audit import progress, verify
from ensemble_attacks.evaluation.identity import code_version
from ensemble_attacks.evaluation.manifest import manifest_of
from ensemble_attacks.evaluation.settings import Sweep
from ensemble_attacks.evaluation.summary import summarise

__all__ = ["Sweep", "code_version", "manifest_of", "progress", "summarise", "verify"]
