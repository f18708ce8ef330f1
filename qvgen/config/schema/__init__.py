"""The frozen dataclasses that a configuration becomes: each key's type, range and meaning has its one home here."""
