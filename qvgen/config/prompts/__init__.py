"""Prompts: captions with what a user says of each; their files' form is in :mod:`qvgen.config.prompts.prompt`."""
