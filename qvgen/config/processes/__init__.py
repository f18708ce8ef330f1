"""The processes of a run: those that another launcher started, the GPUs that are seen, and how many are chosen."""
