"""What graphs are made of, how long groups take on kinds of devices, and where each number comes from. No torch."""
