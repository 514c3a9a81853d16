"""Ensemble defenses as RobustBench-style models: images in [0, 1] -> logits (N, K), normalisation inside."""

from defenses.zoo import list_models, load_model, train_model

__all__ = ["list_models", "load_model", "train_model"]
