"""Parts that several commands of the lab use: the script under measurement, clocks, collectives, options."""
