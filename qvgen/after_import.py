"""Run a module of ours once another one has been imported, without importing that one ourselves.

diffusers keeps its quantizers in two dictionaries and has no entry point for those of other packages, so ``import qvgen`` has
to write into them. Importing diffusers for that would take seconds in every command, also in those that only answer
``--help``. So the entry is made at once where diffusers is there already, and at the end of diffusers' own import otherwise:
a finder waits for that one module, finds it as Python would have, and is gone once it was imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def after_import(awaited: str, then: str) -> None:
    """Import the module ``then`` as soon as ``awaited`` is imported: now, if it is already.

    Args:
        awaited: Full name of a module that somebody else imports.
        then: Full name of ours; importing it does what is to be done.
    """
    if awaited in sys.modules:
        import_module(then)
    else:
        sys.meta_path.insert(0, _Waiting(awaited, then))


class _Waiting(MetaPathFinder):
    def __init__(self, awaited: str, then: str) -> None:
        self.awaited, self.then = awaited, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the awaited module by Python's other finders, with a last line added to its execution."""
        del path, target
        if fullname != self.awaited or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)  # so that the next line asks the others
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_go_on(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == self.awaited:  # a zip file's loader serves all of its modules
                    import_module(self.then)

            setattr(spec.loader, "exec_module", execute_and_go_on)  # noqa: B010 - mypy refuses a method's assignment
        return spec
