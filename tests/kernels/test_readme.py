"""The worked examples of kernels/README.md and of the docstrings run and give what they say."""

import doctest
from pathlib import Path

import pytest
import torch

from qvgen_kernels import contract

README = Path(__file__).parents[2] / "kernels" / "README.md"


def test_readme_examples():
    with torch.no_grad():
        result = doctest.testfile(str(README), module_relative=False)
    assert result.attempted >= 8
    assert result.failed == 0


@pytest.mark.parametrize("module", [contract])
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert result.failed == 0
