"""The model's passes: its sections beside their floors, attention, kernels, replacements of its parts."""
