"""How the question is worded that training data and evaluation both ask. Knows nothing else."""

SHOWS = "Does the picture show this: {}"
