"""A plan written out as the program of every rank, simulated, measured, exported."""
