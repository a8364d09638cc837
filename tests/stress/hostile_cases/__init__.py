"""Cases of hostile input, environments, signals and disks, a module for each group."""
