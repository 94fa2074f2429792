"""Pipeline: the tasks of prepare, the engines that run them, and the stores for their results."""
