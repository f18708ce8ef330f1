"""The processes of a run: launched, watched, and their shares of a model's parameters."""
