"""The pipeline of a folder, asked by running its code without weights: the inside of :mod:`qvgen.models.any_diffusers`.

signature           which pipeline a folder is of, what its call takes, and what is refused by name before anything is built
outline             the pipeline without weights: parts on the meta device whose calls are recorded
measured            facts that recorded calls show: order of dimensions, normalization of latents, the transformer's arguments
recorded_pipeline   the pipeline of one folder, asked
objective           the formula that a scheduler undoes
described_family    the model's sizes, classes, shapes and objective
"""
