"""Pipeline: the tasks of prepare, what is decided between them, and the stores for their results."""
