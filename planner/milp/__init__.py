"""Mixed-integer formulations, one a file, and the only call to the solver."""
