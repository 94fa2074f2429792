"""Captioning: the models that write captions, and the journal of what they wrote."""
