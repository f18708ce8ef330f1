"""Any text-to-video (or text-to-image) model of diffusers whose transformer no other file of this folder names.

signature           which pipeline a folder is of, what its call takes, and what is refused by name before anything is built
outline             the pipeline without weights: parts on the meta device whose calls are recorded
measured            what recorded calls show: order of dimensions, normalization of latents, arguments of the transformer
recorded_pipeline   the pipeline of one folder, asked
objective           the formula that a scheduler undoes
described_family    what the model is: sizes, classes, shapes, objective
family              what is done with it: :class:`~qvgen.models.any_diffusers.family.AnyDiffusers`
"""
