"""Where planning problems come from: captured graphs, abstract models, measured expert loads."""
