"""Other layouts of the optimizer, a module each: what it puts in the place of parts of train_gpt.py.

A module imports what it uses from train_gpt.py and says in REPLACES what it replaces. Every method of its
classes overrides one of the trainer's. `record layouts` writes the trainer with such a module at its end.
"""
