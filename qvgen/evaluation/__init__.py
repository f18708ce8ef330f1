"""The worth of a model: metrics against the teacher, the small classifier, the report of a run.

Left out: importing anything here, so that one metric costs no import of the others' libraries.
"""
