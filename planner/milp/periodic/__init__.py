"""Mixed-integer programs of the steady state: one period's pattern, repeated, with warm-up and cool-down squeezed."""
