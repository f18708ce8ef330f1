"""The benchmarks, one file or room for each; a benchmark is imported when it is named."""
