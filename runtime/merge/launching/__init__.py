"""Starting a merge from a recipe, and storing experts as parts and rebuilding them: the library form of the verbs."""
