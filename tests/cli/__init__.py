"""Tests of run.sh and its commands, of signals and ranks, and of the documents' links and commands."""
