"""Costs measured on this machine: groups timed as a rank runs them."""
