"""Mixed-integer programs that decide who goes first at a placement: whole orders, windows of one, the exact model."""
