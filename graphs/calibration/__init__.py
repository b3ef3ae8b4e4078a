"""What a merge method wants to know from running the models: the recipe's key, and the streams that find it out."""
