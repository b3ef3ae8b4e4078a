"""One rank of a plan: its stages as code, its transfers and reductions, a loop over its instructions."""
