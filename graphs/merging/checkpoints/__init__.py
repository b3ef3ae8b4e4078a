"""What checkpoints hold, read from headers and configs alone: tensors, adapters, banks of experts, quantisation."""
