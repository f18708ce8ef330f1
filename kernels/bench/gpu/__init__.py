"""Measure the GPU kernels of this checkout on the card of this machine: ``bash kernels/bench/gpu.sh OUT``.

    models             shapes of the models' layers, from conf/model
    layer              random packed layers
    setting            the device, and the tiny shapes of a rehearsal
    clock              times of calls, interleaved
    correctness        outputs and sums held to the exact reference
    sanitizer          compute-sanitizer on a small case
    table              M x K -> N of every model beside torch's own products
    blocks             a transformer block in bfloat16 and packed, both compiled
    attention          attention in 8 bits, held to the reference
    attention_gradient its gradient, held to the reference's
    attention_times    beside torch's attention and SageAttention
    fake_quantization  a training step of one layer, fused and eager
    tiles              the fastest tiles of the card, with the time that is left
    part               runs one of these in a process of its own
    page               the report, from the JSON

A part that fails or takes too long takes nothing else with it: its rows are in its JSON from the moment they are known.
"""

import sys
import types

try:
    import jaxtyping  # noqa: F401
except ImportError:  # it writes shapes into annotations; without it they are not read, and nothing else is missing

    class _Annotation:
        def __class_getitem__(cls, _: object) -> type:
            return object

    _stand_in = types.ModuleType("jaxtyping")
    for _name in ("Float", "Float32", "Float64", "Int", "Int32", "UInt8", "Bool", "Shaped", "Num", "Integer", "Real"):
        setattr(_stand_in, _name, _Annotation)
    sys.modules["jaxtyping"] = _stand_in
