"""Training runs: configuration, data, optimizer, the loop, and the processes around it."""
