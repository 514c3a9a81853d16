"""Load models by name, their cards and weights, and other people's checkpoints."""

from defenses.zoo.load import list_models, load_model, model_card, register_with_robustbench

__all__ = ["list_models", "load_model", "model_card", "register_with_robustbench"]
