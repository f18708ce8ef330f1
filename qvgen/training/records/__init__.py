"""Findings of earlier plans: a model's layers, and counted steps, so that a plan need not import and run the model.

keys      what a record depends on, as one text
store     records that are shipped with qvgen, and those of the user's cache folder
frame     a transformer's modules, parameters and buffers as plain data, and back
shipped   the command that makes the shipped ones
"""
