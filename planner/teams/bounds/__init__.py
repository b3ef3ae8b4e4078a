"""Seconds that no plan of given degrees is below."""
