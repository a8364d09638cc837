"""Reads logs; makes, proves and shows records and sweeps. Never imports torch. ../README.md lists it."""
