"""The trained networks, their losses, and gathering their tensors under ZeRO."""
