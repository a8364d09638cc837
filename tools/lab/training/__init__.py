"""The training of a sweep: what is trained next, and the process that trains it."""
