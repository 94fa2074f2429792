"""The networks that are trained, their losses, and whole tensors of them under ZeRO."""
