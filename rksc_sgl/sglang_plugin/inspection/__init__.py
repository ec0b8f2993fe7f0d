"""What can be seen from outside: reports, counters, routes, the tree."""
