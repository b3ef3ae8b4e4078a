"""Models, merge recipes and clusters as data: the operator graph, what its operators cost, the devices it runs on."""
