"""The ring of stages in shared memory between the warp that copies chunks and the warps that multiply them.

Chunk number ``step`` of a program (over all its tiles) lies in stage ``step % stages`` on that stage's lap ``step //
stages``. Every stage has two barriers, ``ready`` and ``empty``, whose phases are laps: a wait for phase p returns once a
lap of that parity is complete. The copying warp waits for ``empty`` of the lap before (the parity that a new barrier counts
as complete, so that the first lap does not wait), the multiplying warps for ``ready`` of this lap. A stage is given back
one chunk late: when the product of chunk ``step`` is under way, that of ``step - 1`` has ended, and none is waited for in
vain.

Also here: which tile of outputs and rows a number stands for, in bands of tiles of outputs as in qvgen_kernels.triton.gemm.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["place_of", "stage_before", "stage_of", "tile_count"]


@gluon.jit
def stage_of(step, stages: gl.constexpr):
    """Stage of a chunk, and the phase that its ``ready`` barrier completes."""
    return step % stages, (step // stages) & 1


@gluon.jit
def stage_before(step, stages: gl.constexpr):
    """Stage of the chunk before."""
    return (step + stages - 1) % stages


@gluon.jit
def tile_count(sizes, form: gl.constexpr):
    """Tiles of the whole product."""
    over_n = (sizes.outputs + form.outputs - 1) // form.outputs
    over_m = (sizes.rows + form.rows - 1) // form.rows
    return over_n * over_m


@gluon.jit
def place_of(tile, sizes, form: gl.constexpr):
    """First output and first row of a tile."""
    over_n = (sizes.outputs + form.outputs - 1) // form.outputs
    over_m = (sizes.rows + form.rows - 1) // form.rows
    band = tile // (form.band * over_m)
    first = band * form.band
    size = min(over_n - first, form.band)
    inside = tile % (form.band * over_m)
    return (first + inside % size) * form.outputs, (inside // size) * form.rows
