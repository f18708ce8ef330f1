"""LoRAs as people have them: what a key of the configuration names, what a file holds, and how it is merged.

choice    which files, each with which scale
file      a file on this machine, its header and its configuration
key       what a key of a file means, in the names of each trainer
plan      which tensor is added to which parameter
merge     W <- W + scale alpha / rank B A, for all LoRAs together
"""
