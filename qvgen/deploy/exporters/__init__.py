"""Targets of `qvgen export`: one file for each format of another runtime, and the parts that they share."""
