"""Pictures for people: sheets and grids, vector drawings, films. Knows PIL; no torch and no model."""
