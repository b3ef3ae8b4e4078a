"""The operators that mipipe adds to ATen, where models use them, and what each operator computes."""
