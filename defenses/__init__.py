"""Provide ensemble defenses as RobustBench-style models: images in [0, 1] -> logits (N, K), normalisation inside."""

from defenses.convert import convert
from defenses.recipes import train_model
from defenses.zoo.combine import COMBINATIONS as COMBINATIONS
from defenses.zoo.foreign import KINDS as KINDS
from defenses.zoo.foreign import datasets_of as datasets_of
from defenses.zoo.foreign import load_folder as load_folder
from defenses.zoo.load import list_models, load_model, model_card, register_with_robustbench

__all__ = ["convert", "list_models", "load_model", "model_card", "register_with_robustbench", "train_model"]
