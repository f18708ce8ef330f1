"""Metrics of generated videos, one leaf a file: its formula, source, range and direction."""
