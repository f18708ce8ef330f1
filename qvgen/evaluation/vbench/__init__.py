"""VBench's dimensions as published: which prompts each one looks at, its network, its value, and the weighted total."""
