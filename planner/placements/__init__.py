"""Who may hold what: shapes fitted to a problem, cuts into stages, what fits in memory."""
