"""Converting checkpoints: mixtures of experts factorised, merged, compressed, pruned, or made from dense models."""
