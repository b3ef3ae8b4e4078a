"""Searching the values that a recipe leaves open, and measuring what merged models can do."""
