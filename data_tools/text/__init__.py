"""Text: turning the words about a picture into a clean caption."""
