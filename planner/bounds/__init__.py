"""What no plan can beat, worked out without a solver: at one placement, and over all placements."""
