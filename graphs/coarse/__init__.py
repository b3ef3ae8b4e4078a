"""Operators merged into the groups that a planner places, and what a graph is made of."""
