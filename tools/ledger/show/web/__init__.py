"""The page of the ledger and the page of runs in progress: their facts, templates, styles and programs."""
