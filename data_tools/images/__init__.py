"""Images: opening a picture, judging what it is, and telling which ones look alike."""
