"""A model's folder in the hub's layout: found, identified, read without executing anything of it."""
