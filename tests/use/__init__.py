"""Tests of what is done with a finished model."""
