"""Using a checkpoint: load, sample, score, every direction, bulk sampling."""
