"""What a user may point at as a model, and what transformers' architectures need to be captured."""
