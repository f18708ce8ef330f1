"""Tells torch's compiler about functions of ours, as soon as the compiler itself is imported.

Its decorators import the compiler, which takes seconds; so :mod:`qvgen.layers.attention_form` leaves them to this module,
which :func:`qvgen.after_import.after_import` runs when somebody compiles something.
"""

from __future__ import annotations

import torch

from qvgen.layers import attention_form

torch.compiler.assume_constant_result(attention_form.scaled_spec)  # it marks the function itself; plain data, made once
