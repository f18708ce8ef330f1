"""Data: clips and captions, and which noise and which step they meet."""
