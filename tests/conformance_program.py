"""Run pytest in a process that is forked from one that has imported all of qvgen (tests/warm_python.py).

python -m tests.conformance_program FILE ... [OPTION ...]

The modules that are there already are not rewritten, of which pytest would warn: what they assert is not said in full.
"""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main(["-W", "ignore::pytest.PytestAssertRewriteWarning", *sys.argv[1:]]))
