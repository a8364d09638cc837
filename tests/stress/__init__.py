"""Soak, kills, fuzz and hostile cases: programs that run by themselves, and long tests of them."""
