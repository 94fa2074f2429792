"""Pictures for viewers: sheets and grids, vector drawings, videos. Knows PIL; no torch and no model."""
