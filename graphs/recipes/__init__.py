"""Training recipes as parts of a graph: losses over responses, a frozen reference model, adapters."""
