"""The commands of run.sh, by subject; cli.py is the table of them."""
