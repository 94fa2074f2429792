"""Text: cleaning what is said of a picture into a caption."""
