"""VBench's own program, called in an environment of the user's: the request, the process, and its answer as plain JSON."""
