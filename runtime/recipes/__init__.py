"""Training recipes at work: optimizers of matrices, adapters on disk, rollouts as data."""
