"""Is a defense masking its gradients? Named checks, each with figure, threshold, verdict, source and what to run next."""

from ensemble_attacks.diagnostics.checks import Check, Diagnosis, diagnose

__all__ = ["Check", "Diagnosis", "diagnose"]
