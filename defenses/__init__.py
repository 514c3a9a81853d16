"""Provide ensemble defenses as RobustBench-style models: images in [0, 1] -> logits (N, K), normalisation inside."""

from defenses.convert import convert
from defenses.recipes import train_model
from defenses.zoo.load import list_models, load_model, model_card, register_with_robustbench

__all__ = ["convert", "list_models", "load_model", "model_card", "register_with_robustbench", "train_model"]
