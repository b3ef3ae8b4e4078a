"""Operators merged into the groups that a planner places, counted and drawn."""
