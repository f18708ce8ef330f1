"""``python -m tests.pytest_program ARGUMENTS``: pytest, as a module of ours, so that its process is forked (warm_python)."""

import sys

import pytest

if __name__ == "__main__":
    # What was imported before can't have its assertions rewritten, which is said of pytest's own plugins.
    sys.exit(pytest.main(["-W", "ignore::pytest.PytestAssertRewriteWarning", *sys.argv[1:]]))
