"""Proves what the files of a folder claim, from its logs and its script."""
