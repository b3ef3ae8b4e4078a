"""One placement as jobs on machines: stages, times, arrays, arcs and paths."""
