"""Reads what runs and scripts leave: logs of every dialect, scores, JSON by its schema, settings."""
