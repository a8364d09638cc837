"""Makes the files of records, sweeps and measurements from their logs: JSON, tables, pages, pictures."""
