"""How the weights were made."""

from defenses.training.trainer import Batch, Recipe, Settings, adam, input_gradients, pair_cosines, sgd, train

__all__ = ["Batch", "Recipe", "Settings", "adam", "input_gradients", "pair_cosines", "sgd", "train"]
