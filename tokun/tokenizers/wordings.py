"""The wording of the question that training data and evaluation share."""

SHOWS = "Does the picture show this: {}"
