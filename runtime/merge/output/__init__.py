"""What a merge leaves: the files beside the weights, checked as transformers would open them, one merge at a time."""
