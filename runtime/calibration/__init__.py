"""Models run layer by layer on samples of text, and the statistics that merge methods read from it."""
