"""Mixed-integer programs that decide who holds what: shares, routes, copies, degrees, and the bound over placements."""
