"""The stages of a run, each resumable; the loop, engines, monitoring and records."""
