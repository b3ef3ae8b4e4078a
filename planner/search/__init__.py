"""Heuristics for the order at one placement: list rules, quotas, annealing."""
