#!/usr/bin/env bash
# Everything that is to be known of a GPU, in at most 8 minutes: is it right, is it fast. Results as JSON, and one page.
#
#     bash kernels/bench/gpu.sh OUT                 on a machine with a GPU
#     bash kernels/bench/gpu.sh OUT --rehearse      the same on the CPU: tiny shapes, Triton's interpreter
#     bash kernels/bench/gpu.sh OUT --parts table   some of it: correctness,table,blocks,attention,
#                                                   attention_gradient,attention_times,fake_quantization,
#                                                   sanitizer,tiles
#
# It needs torch >= 2.8, triton >= 3.6, numpy, safetensors and this checkout; PYTHON names the interpreter.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
export PYTHONPATH="$root:$root/kernels:$here${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"
if ! "$python" -c 'import numpy, safetensors, torch, triton'; then
    echo "$python lacks what the line above names; name an interpreter that has it: PYTHON=.venv/bin/python bash $0 OUT" >&2
    exit 2
fi
exec "$python" -m gpu "$@"
