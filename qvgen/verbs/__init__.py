"""The verbs: straight stories of steps. The only rooms that know the order of things."""
