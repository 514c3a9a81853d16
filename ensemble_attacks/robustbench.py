"""Provide RobustBench, unforked (`ensemble_attacks.hosts.robustbench`)."""

from ensemble_attacks.hosts.robustbench import EvaluationState, benchmark, ensure, pipeline

__all__ = ["EvaluationState", "benchmark", "ensure", "pipeline"]
