"""Checkpoints of a run, and the model it saves in the end: written, resumed, checked before all work is done."""
