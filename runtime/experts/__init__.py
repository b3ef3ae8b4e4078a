"""Expert parallelism in a run: tokens exchanged, routing counted, experts moved."""
