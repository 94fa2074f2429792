"""What every room may use: how a command ends, optional packages, memory, files that are whole or not there. Knows nothing of models."""
