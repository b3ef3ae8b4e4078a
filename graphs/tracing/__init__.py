"""A segment as functions F, I and W of explicit tensors, as data and as code."""
