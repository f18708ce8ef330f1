#!/usr/bin/env bash
# What a training step costs on a GPU, in at most 8 minutes: seconds and memory, beside the plan and the prediction.
#
#     bash benchmarks/train_gpu.sh OUT                 on a machine with a GPU
#     bash benchmarks/train_gpu.sh OUT --rehearse      the same on the CPU at tiny sizes
#     bash benchmarks/train_gpu.sh OUT --parts steps   some of it: steps,blocks,runs
#
# It needs torch >= 2.8, this checkout and what qvgen needs besides (pip install -e . brings it). On a machine without network,
# WHEELS=FOLDER names a folder of wheels: those are put into OUT/packages and used there. PYTHON names the interpreter.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/.." && pwd)"
if [ $# -lt 1 ]; then
    sed -n '2,10p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
python="${PYTHON:-python3}"
export PYTHONPATH="$root:$root/kernels:$here${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$1/packages" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$1/packages"
fi
if ! "$python" -c 'import torch, diffusers, lightning, hydra, safetensors, jaxtyping'; then
    echo "$python lacks what the line above names; name an interpreter that has it (PYTHON=.venv/bin/python bash $0 OUT) or" \
        "a folder of wheels (WHEELS=FOLDER)" >&2
    exit 2
fi
exec "$python" -m train_gpu "$@"
