"""What the pieces of a model cost on a team of given degrees: seconds, bytes, collectives."""
