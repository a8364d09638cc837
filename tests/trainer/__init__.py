"""Tests of train_gpt.py: mathematics against float64, whole runs through main, ranks, faults."""
