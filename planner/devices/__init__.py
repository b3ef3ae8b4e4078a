"""Device-placement workloads: operators on accelerators and CPU cores, without an order."""
