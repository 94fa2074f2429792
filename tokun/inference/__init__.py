"""A checkpoint in use: load, sample, score, every direction, many samples at once."""
