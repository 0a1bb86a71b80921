"""Other programs' files: checkpoints that are converted, step lists that are exported."""
