"""What people write: recipes in mergekit's vocabulary, brought to one form and checked to the last key."""
