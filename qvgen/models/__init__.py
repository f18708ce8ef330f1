"""Model families: what a video diffusion transformer is called with, what its captions mean, how it samples.

One file per family and one yaml in ``conf/model``; :mod:`qvgen.models.base` says what a family has to have. This floor
and ``deploy`` are the only ones that import diffusers.
"""
