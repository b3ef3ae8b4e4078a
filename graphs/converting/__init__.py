"""Conversions of mixtures of experts: recipes, what a source checkpoint holds, and decisions that need no tensors."""
