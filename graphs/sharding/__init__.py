"""Modes of a segment: its trace becomes the program of one member of a team."""
