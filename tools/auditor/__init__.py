"""The nine tests of the auditor, and what they work with. audit.py, beside this folder, is the command."""
