"""A plan, its program and its graph become one rank's instructions, with everything resolved before the first step."""
