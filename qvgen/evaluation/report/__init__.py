"""The report of a run and the comparison of runs: pages of one file, and report.json for other programs."""
