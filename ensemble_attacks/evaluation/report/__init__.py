"""Write a report of a run that a reviewer can check."""

from ensemble_attacks.evaluation.report.pages import write_report

__all__ = ["write_report"]
