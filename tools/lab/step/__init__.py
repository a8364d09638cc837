"""The whole training step: its parts in bursts, steps on a warm card, its communication on a timeline."""
