"""Helpers for every package: how a command exits, optional packages, memory, atomic file writes. Knows nothing of models."""
