"""Images: opening and judging pictures, and finding those that look alike."""
