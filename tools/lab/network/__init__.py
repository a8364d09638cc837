"""The optimizer step as the network sees it: taken on several ranks, and a prediction of its time."""
