"""The source of the Gluon product run on the CPU: its two sides as threads, its barriers, copies and products by their rules.

Gluon has no interpreter. Here the functions of ring.py and gemm.py are executed as Python, statement by statement, with
stand-ins for the language's names:

    mbarrier   arrivals and bytes complete a phase; a wait for a parity returns once a phase of that parity is complete
    tma        copies a chunk with zeros beyond the ends: at once, or as late as its barrier is waited for
    wgmma      multiplies at once, or as late as it is waited for: what was overwritten meanwhile is multiplied
    epilogue   takes what it is given: the sums, and the outputs and rows that they are of

A copy at once with a product as late as can be finds a stage that is given back too early; the other way round one that is
read too early. A wait that nothing ends is an error. What is left out: layouts in registers, swizzles, and the arithmetic
of the epilogue, whose functions the Triton kernels share.
"""

import inspect
import threading
from types import SimpleNamespace

import numpy as np

import tests.kernels.triton_interpreter  # noqa: F401 - in one process all tests have Triton's functions interpreted
from qvgen_kernels.gluon import gemm, ring


class StuckError(Exception):
    """A wait that nothing ends, because every other side has ended or waits too."""


class World:
    """What all stand-ins share: when copies and products happen, and one lock."""

    def __init__(self, *, eager_copies, eager_products, program, programs):
        self.eager_copies, self.eager_products = eager_copies, eager_products
        self.program, self.programs = program, programs
        self.changed = threading.Condition()
        self.failed = []
        self.running = self.waiting = 0

    def wait_for(self, holds):
        """Wait under the lock until something holds; an error where every side waits."""
        while not holds():
            self.running, self.waiting = self.running - 1, self.waiting + 1
            self.look()
            if not self.failed:
                self.changed.wait()
            if self.failed:
                raise StuckError

    def look(self):
        """End all sides where those that have not ended wait for each other."""
        if self.waiting and not self.running:
            self.stop(StuckError())

    def wake(self):
        """Let all that wait look again."""
        self.running, self.waiting = self.running + self.waiting, 0
        self.changed.notify_all()

    def stop(self, error):
        """End all sides."""
        self.failed.append(error)
        self.wake()


class Barrier:
    """One mbarrier."""

    def __init__(self, world):
        self.world, self.phase, self.count, self.pending, self.nbytes, self.late = world, 0, None, 0, 0, []

    def init(self, count):
        self.count = self.pending = count

    def arrive(self, count, nbytes=0):
        with self.world.changed:
            assert self.pending >= count, "more arrivals than the barrier was made for"
            self.pending -= count
            self.nbytes += nbytes
            self._complete()

    def copied(self, nbytes):
        with self.world.changed:
            self.nbytes -= nbytes
            self._complete()

    def _complete(self):
        if self.pending == 0 and self.nbytes == 0:
            self.phase ^= 1
            self.pending = self.count
            self.world.wake()

    def wait(self, parity):
        """Return once the phase of that parity is complete; late copies into this barrier happen now."""
        with self.world.changed:
            while True:
                self.world.wait_for(lambda: self.phase != parity or self.late)
                if not self.late:
                    return
                self.late.pop(0)()


class Buffers:
    """Shared memory: stages of arrays, or of barriers."""

    def __init__(self, stages, make):
        self.stages = [make() for _ in range(stages)]
        self.type = SimpleNamespace(shape=[stages, *getattr(self.stages[0], "shape", ())])

    def index(self, stage):
        return self.stages[stage]


class Array(np.ndarray):
    """An array with the one method of a memory descriptor that the source uses."""

    def permute(self, order):
        return self.transpose(order)


class Descriptor:
    """A matrix in global memory of which TMA copies blocks."""

    def __init__(self, matrix, block):
        self.matrix, self.layout = matrix, None
        self.block_type = SimpleNamespace(shape=list(block))
        self.nbytes_per_cta = block[0] * block[1]

    def block(self, row, column):
        made = np.zeros(self.block_type.shape, np.int8)
        part = self.matrix[row : row + made.shape[0], column : column + made.shape[1]]
        made[: part.shape[0], : part.shape[1]] = part
        return made


class Sums:
    """An accumulator with products that are under way."""

    def __init__(self, value, pending=()):
        self.value, self.pending = value, list(pending)


def names(world, results):
    """The stand-ins by the names that the source uses."""

    def load(descriptor, place, barrier, target):
        def copy():
            target[...] = descriptor.block(*place)
            barrier.copied(descriptor.nbytes_per_cta)

        if world.eager_copies:
            copy()
        else:
            with world.changed:
                barrier.late.append(copy)
                world.wake()

    def multiply(first, second, sums, is_async):
        assert is_async
        made = Sums(sums.value, sums.pending)
        now = world.eager_products
        made.pending.append((first.copy(), second.copy()) if now else (first, second))
        return made

    def wait(num_outstanding, deps):
        (sums,) = deps
        assert isinstance(sums, Sums)
        left, value = sums.pending, sums.value
        while len(left) > num_outstanding:
            first, second = left.pop(0)
            value = value + first.astype(np.int32) @ second.astype(np.int32)
        return Sums(value, left)

    def shared(_, shape, layout):
        if layout == "barrier":
            return Buffers(shape[0], lambda: Barrier(world))
        return Buffers(shape[0], lambda: np.full(shape[1:], 77, np.int8).view(Array))

    def keep(y, sums, group, place, operands, sizes, form):
        assert group == 0
        assert not sums.pending
        results.append((*place, sums.value))
        return y

    def specialize(sides, warps, registers):
        def run(function, arguments):
            failure = None
            try:
                function(*arguments)
            except Exception as error:
                failure = error
            with world.changed:
                world.running -= 1
                if failure is not None:
                    world.stop(failure)
                world.look()

        world.running = len(sides)
        threads = [threading.Thread(target=run, args=side) for side in sides]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if world.failed:
            raise world.failed[0]

    language = SimpleNamespace(
        constexpr=int, int8="int8", int32="int32", int64="int64", float32="float32",
        program_id=lambda _: world.program, num_programs=lambda _: world.programs, static_range=range,
        zeros=lambda shape, dtype, layout: Sums(np.zeros(shape, np.int32)),
        arange=lambda first, last, layout: np.arange(first, last), convert_layout=lambda sums, layout: sums,
        NVMMADistributedLayout=lambda *_: None, BlockedLayout=lambda *_: None, SliceLayout=lambda *_: None,
        allocate_shared_memory=shared, warp_specialize=specialize,
    )  # fmt: skip
    barriers = SimpleNamespace(
        MBarrierLayout=lambda: "barrier",
        init=lambda barrier, count: barrier.init(count),
        wait=lambda barrier, parity: barrier.wait(parity),
        expect=lambda barrier, nbytes: barrier.arrive(1, nbytes),
        arrive=lambda barrier, count, pred=True: barrier.arrive(count) if pred else None,
    )
    return {
        "gl": language, "mbarrier": barriers, "tma": SimpleNamespace(async_load=load), "add_group": keep,
        "finish": lambda *_: None, "warpgroup_mma": multiply, "warpgroup_mma_wait": wait,
        "_COPYING_WARPS": 1, "_COPYING_REGISTERS": 24,
    }  # fmt: skip


FUNCTIONS = [
    *(getattr(ring, name) for name in ("stage_of", "stage_before", "tile_count", "place_of")),
    *(gemm._copy, gemm._multiply, gemm.multiply_kernel),
]


def product(w, x, *, form, programs, eager_copies, eager_products, change=lambda source: source):
    """The int32 sums [N, M] that the kernel makes of codes [N, K'] and [M, K'], and how often each was written.

    Args:
        w: int8 codes of the weight.
        x: int8 codes of the rows.
        form: The kernel's constants, or what has their names.
        programs: Programs of the launch.
        eager_copies: Whether copies happen at once.
        eager_products: Whether products read their operands at once.
        change: What is done to the source before it is run.
    """
    sums = np.zeros((len(w), len(x)), np.int32)
    written = np.zeros(sums.shape, np.int32)
    chunk = 128
    sizes = SimpleNamespace(rows=len(x), outputs=len(w), chunks=-(-w.shape[1] // chunk))
    for program in range(programs):
        world = World(eager_copies=eager_copies, eager_products=eager_products, program=program, programs=programs)
        results = []
        space = names(world, results)
        for function in FUNCTIONS:
            source = inspect.getsource(function.fn)
            exec(change(source[source.index("def ") :]), space)
        descriptors = (Descriptor(w, (form.outputs, chunk)), Descriptor(x, (form.rows, chunk)))
        space["multiply_kernel"](descriptors, None, None, sizes, form)
        for n, m, value in results:
            inside = np.ix_(n < len(w), m < len(x))
            place = np.ix_(n[n < len(w)], m[m < len(x)])
            sums[place] = value[inside]
            written[place] += 1
    return sums, written
