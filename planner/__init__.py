"""From a problem to a plan with a bound: placement, routes and the order of every action on every rank."""
