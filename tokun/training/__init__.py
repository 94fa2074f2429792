"""The stages of a run, each resumable; what drives, watches and records them."""
