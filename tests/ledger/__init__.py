"""Tests of records, sweeps and measurements: every claim is met by a fault that it catches."""
