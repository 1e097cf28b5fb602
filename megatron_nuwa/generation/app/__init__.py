"""A local page on which one picks a task, types, draws, and watches frames arrive."""
