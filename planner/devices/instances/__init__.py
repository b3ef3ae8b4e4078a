"""Device-placement workloads as arrays, and the smaller ones that follow from what cannot be cut."""
