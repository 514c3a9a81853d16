"""One trainer for every recipe."""

from defenses.training.trainer import Recipe, train

__all__ = ["Recipe", "train"]
