"""The wordings of questions that training data and evaluation share."""

SHOWS = "Does the picture show this: {}"
SUBJECT = "What is its subject?"
