"""Recipes with values left open, and the points of the space that these span."""
