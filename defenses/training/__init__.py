"""Train the ensembles whose weights ship."""

from defenses.training.plan import Batch, Plan, Recipe, Settings
from defenses.training.trainer import adam, input_gradients, pair_cosines, sgd, train

__all__ = ["Batch", "Plan", "Recipe", "Settings", "adam", "input_gradients", "pair_cosines", "sgd", "train"]
