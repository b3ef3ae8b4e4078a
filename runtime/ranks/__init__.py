"""What a process is to the others of a run: its place, its groups, what it sends and waits for, how a run is set."""
