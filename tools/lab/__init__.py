"""Measures on this machine, with torch: five commands, and rooms for their parts. ../README.md lists them."""
