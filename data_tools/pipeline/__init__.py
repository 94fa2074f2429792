"""Pipeline: the tasks of prepare, what runs them, and the stores that hold their results."""
