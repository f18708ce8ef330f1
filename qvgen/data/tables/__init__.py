"""Readers of tables of clips, one file per form; :mod:`qvgen.data.tables.recognize` says which one a path needs.

    read(path, wished=Columns(...)) -> Rows      names and captions as they are written, and where bytes are

A reader never guesses a type: text is what the file says, character for character, and what is no text is refused with
the file and the line. No video is opened.
"""
