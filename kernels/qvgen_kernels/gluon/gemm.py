"""Packed weight times quantized rows on Hopper, y^T = W x^T, with Triton's epilogue in the same kernel.

A program goes over many tiles. One warp copies chunks of 128 columns of both operands by TMA into a ring of stages
(ring.py); eight warps multiply them by asynchronous wgmma of signed bytes and wait, in each chunk, for the product of the
chunk BEFORE, so that the tensor cores always have one to go on with. Sums of a tile are brought to an order in which a
thread holds eight neighbouring outputs, and go through the contract's epilogue: the very functions of
qvgen_kernels.triton.epilogue. Meanwhile the copying warp fills the stages for the next tile.

Copies beyond the last row, output or column read zeros.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qvgen_kernels.contract import LinearSpec
from qvgen_kernels.gluon.ring import place_of, stage_before, stage_of, tile_count
from qvgen_kernels.gluon.tile import CHUNK, WARPS
from qvgen_kernels.triton.backend import Product
from qvgen_kernels.triton.epilogue import add_group, finish
from qvgen_kernels.triton.gemm import GemmForm, gemm_form, launch_arguments
from qvgen_kernels.triton.launch import launch
from qvgen_kernels.triton.layout import layout_of
from qvgen_kernels.triton.tuned import Tile

__all__ = ["OPERAND", "RingForm", "multiply_kernel", "ring_form", "run_product"]

OPERAND = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
"""Order of both operands in shared memory: rows of 128 bytes, swizzled as wgmma and TMA agree on."""

_COPYING_WARPS = gl.constexpr(1)
_COPYING_REGISTERS = gl.constexpr(24)


@dataclass(frozen=True)
class RingForm(GemmForm):
    """Constants of a compiled product.

    Attributes:
        stages: Stages of the ring.
        warps: Warps that multiply.
        instruction: Rows of a matrix instruction; 256 are more than the compiler takes for signed bytes.
    """

    stages: int
    warps: int
    instruction: int


@gluon.jit
def _copy(descriptors, buffers, barriers, sizes, form: gl.constexpr):
    """Fill stages with the chunks of all tiles of this program."""
    step = 0
    columns: gl.constexpr = buffers[0].type.shape[2]
    for tile in range(gl.program_id(0), tile_count(sizes, form), gl.num_programs(0)):
        n, m = place_of(tile, sizes, form)
        for chunk in range(sizes.chunks):
            stage, phase = stage_of(step, form.stages)
            ready = barriers[0].index(stage)
            mbarrier.wait(barriers[1].index(stage), phase ^ 1)
            mbarrier.expect(ready, descriptors[0].nbytes_per_cta + descriptors[1].nbytes_per_cta)
            tma.async_load(descriptors[0], [n, chunk * columns], ready, buffers[0].index(stage))
            tma.async_load(descriptors[1], [m, chunk * columns], ready, buffers[1].index(stage))
            step += 1


@gluon.jit
def _multiply(buffers, barriers, operands, tail, sizes, form: gl.constexpr):
    """Multiply and finish all tiles of this program."""
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [form.warps, 1], [16, form.instruction, 32])
    stored: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, form.warps], [0, 1])
    step = 0
    for tile in range(gl.program_id(0), tile_count(sizes, form), gl.num_programs(0)):
        first_n, first_m = place_of(tile, sizes, form)
        acc = gl.zeros([form.outputs, form.rows], gl.int32, sums)
        for chunk in range(sizes.chunks):
            stage, phase = stage_of(step, form.stages)
            mbarrier.wait(barriers[0].index(stage), phase)
            x = buffers[1].index(stage).permute((1, 0))
            acc = warpgroup_mma(buffers[0].index(stage), x, acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
            mbarrier.arrive(barriers[1].index(stage_before(step, form.stages)), count=1, pred=chunk > 0)
            step += 1
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(barriers[1].index(stage_before(step, form.stages)), count=1)
        acc = gl.convert_layout(acc, stored)
        n = first_n + gl.arange(0, form.outputs, gl.SliceLayout(1, stored))
        m = first_m + gl.arange(0, form.rows, gl.SliceLayout(0, stored))
        y = gl.zeros([form.outputs, form.rows], gl.float32, stored)
        y = add_group(y, acc, 0, (n, m), operands, sizes, form)
        finish(y, (n, m), tail, sizes, form)


@gluon.jit
def multiply_kernel(descriptors, operands, tail, sizes, form: gl.constexpr):
    """All tiles of a program; descriptors are of (weight, rows), operands (rows, weight) as the epilogue takes them."""
    w, x = descriptors
    chunk: gl.constexpr = x.block_type.shape[1]
    buffers = (
        gl.allocate_shared_memory(gl.int8, [form.stages, form.outputs, chunk], w.layout),
        gl.allocate_shared_memory(gl.int8, [form.stages, form.rows, chunk], x.layout),
    )
    ready = gl.allocate_shared_memory(gl.int64, [form.stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [form.stages, 1], mbarrier.MBarrierLayout())
    stages: gl.constexpr = form.stages
    for stage in gl.static_range(stages):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    barriers = (ready, empty)
    gl.warp_specialize(
        [
            (_multiply, (buffers, barriers, operands, tail, sizes, form)),
            (_copy, (descriptors, buffers, barriers, sizes, form)),
        ],
        [_COPYING_WARPS],
        [_COPYING_REGISTERS],
    )


def ring_form(spec: LinearSpec, tile: Tile) -> RingForm:
    """The constants of the product of a layer: its operands are whole bytes, without a factor."""
    form = replace(gemm_form(spec, tile), shift=0)
    return RingForm(**asdict(form), stages=tile.stages, warps=WARPS, instruction=min(tile.rows, 128))


def run_product(product: Product, tile: Tile, *, programs: int) -> None:
    """Fill the product's y [M, N], M > 0.

    Args:
        product: Quantized rows, a packed weight with codes int8 [N, K'], and what the epilogue reads; without groups.
        tile: Launch parameters.
        programs: Largest number of programs: the card's processors.
    """
    y, spec = product.y, product.spec
    weight, tail, sizes = launch_arguments(
        product.operands, product.weight, y=y, branch=product.branch, tensors=product.tensors, spec=spec
    )
    sizes = sizes._replace(chunks=-(-layout_of(spec).columns // CHUNK))
    tiles = -(-sizes.outputs // tile.outputs) * -(-sizes.rows // tile.rows)
    descriptors = (
        TensorDescriptor.from_tensor(weight.codes, [tile.outputs, CHUNK], OPERAND),
        TensorDescriptor.from_tensor(product.operands.codes, [tile.rows, CHUNK], OPERAND),
    )
    operands, form = (product.operands, weight), ring_form(spec, tile)
    launch(multiply_kernel, (min(tiles, programs),), descriptors, operands, tail, sizes, form, on=y, num_warps=WARPS)
