"""What a launch of a CUDA kernel is given, as csrc/cuda/params.h and csrc/fold.h have it, and how it cuts a problem."""

from __future__ import annotations

from ctypes import Structure, c_bool, c_double, c_float, c_int, c_int64, c_uint32, c_void_p
from typing import NamedTuple

from reattn.backends.common import Part, cut_workspace


class Tensor(Structure):
    """(batch, heads, rows, head_dim), the last contiguous; strides in elements."""

    _fields_ = [
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("row_stride", c_int64),
        ("rows", c_int),
    ]


class MaskTensor(Structure):
    """Broadcast to (batch, heads, rows, keys); strides in elements, 0 where all have the same."""

    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("batch_stride", "head_stride", "row_stride", "key_stride")),
    ]


class Parameters(Structure):
    """See csrc/fold.h. ``norm``: its place in :data:`reattn.backends.common.NORMS`."""

    _fields_ = [
        *((name, c_void_p) for name in ("theta", "bias", "norm_weight", "norm_bias")),
        *((name, c_void_p) for name in ("running_mean", "running_var", "num_batches_tracked")),
        *((name, c_void_p) for name in ("statistics", "grad_sums")),
        ("norm", c_int),
        ("training", c_bool),
        ("heads", c_int),
        ("heads_out", c_int),
        *((name, c_float) for name in ("output_scale", "eps", "momentum", "centre", "taken", "unit_scale")),
    ]


class Fold(Structure):
    """See csrc/fold.h."""

    _fields_ = [("p", Parameters), ("backward", c_bool)]


class Params(Structure):
    """See csrc/cuda/params.h."""

    _fields_ = [
        *((name, Tensor) for name in ("query", "key", "value", "out", "grad", "grad_query", "grad_key", "grad_value")),
        ("fold", Fold),
        *((name, c_void_p) for name in ("seed", "lse", "value_sum", "vectors", "products")),
        *((name, c_void_p) for name in ("mixed", "grad_scores", "grad_key_sum", "grad_value_sum")),
        *((name, c_int) for name in ("first_sample", "first_row", "rows_of_launch", "row_blocks_of_launch")),
        *((name, c_bool) for name in ("first_rows", "last_rows")),
        ("blocks", c_int64),
        *((name, c_void_p) for name in ("grad_theta", "grad_bias", "grad_norm_weight", "grad_norm_bias")),
        *((name, c_float) for name in ("scale", "scale_log2", "keep_scale", "centre")),
        ("drop_below", c_uint32),
        ("added_up", c_bool),
        ("positions", c_double),
        ("final_statistics", c_void_p),
        ("splits", c_int),
        ("mask", MaskTensor),
        *((name, c_void_p) for name in ("pre_theta", "pre_products", "grad_pre_theta")),
    ]


# Shared memory that a block may have, bytes, by compute capability (CUDA C++ Programming Guide, "Technical
# Specifications"): for cards that are not there.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

SUM_THREADS = 256
SUM_BYTES = 256 + 32 * SUM_THREADS

# Columns of an output that a block of the forward pass computes; more head_dim means more blocks.
OUT_DIMS = 64


class Plan(NamedTuple):
    """How a block of a sweep cuts a problem: see csrc/cuda/tiles.cuh. It owns ``rows`` of a sequence and holds the maps
    of ``keys`` keys in shared memory, of all there are if ``resident``."""

    rows: int
    keys: int
    resident: bool
    warps: int
    shared_bytes: int

    @property
    def constants(self) -> tuple[tuple[str, int], ...]:
        """As csrc/cuda takes them."""
        return tuple((f"REATTN_{name.upper()}", int(value)) for name, value in zip(self._fields, self, strict=True))


def blocks_at_once(plan: Plan, shared_bytes: int, multiprocessors: int) -> int:
    """That run on a card at the same time, as far as shared memory says, of which each takes 1 KB more, and a
    multiprocessor's 64 warps and 32 blocks: where registers allow fewer, the others wait."""
    return multiprocessors * min((shared_bytes + 1024) // (plan.shared_bytes + 1024), 64 // plan.warps, 32)


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-number // multiple) * multiple


def padded_heads(heads: int) -> int:
    """In whole eights, as the sums of blocks have them."""
    return round_up(heads, 8)


class Size(NamedTuple):
    """What a plan depends on; ``statistics``: of the batch; ``masked``: keys may be hidden."""

    element_bytes: int
    heads: int
    head_dim: int
    batch: int
    seqlen: int
    seqlen_k: int
    statistics: bool
    dropout: bool = False
    masked: bool = False


def _shared_bytes(kernel: str, size: Size, rows: int, keys: int, warps: int) -> int:
    """What a block takes: csrc/cuda/forward.cu and backward.cu lay it out, and are not compiled for another number."""
    element_bytes, heads, head_dim, *_ = size
    padded = padded_heads(heads)
    maps = round_up(heads * (rows * (keys * element_bytes + 16) + 16), 128)
    # Keys and values go straight to registers where there are enough of them.
    direct = element_bytes == 2 and head_dim <= 64 and warps <= MOST_WARPS
    stages = 0 if direct else 2 * 16 * (round_up(head_dim, 16) * element_bytes + 16)
    folded = round_up((heads * (padded + 1) + 7 * padded) * 4, 128)
    if kernel == "backward":
        scratch = max(stages, padded * (16 * element_bytes + 16))
        return max(round_up(2 * maps + warps * scratch, 128) + folded + 128, warps * padded * (padded + 2) * 4)
    by_row, resident = rows * padded * 4, keys >= size.seqlen_k
    sums = round_up(round_up(maps + warps * stages, 128) + by_row + (not resident) * by_row, 128)
    return sums + folded + size.statistics * (2 + size.masked) * warps * padded * 4


def make_plan(kernel: str, size: Size, shared_bytes: int, multiprocessors: int) -> Plan | None:
    """The plan of ``forward`` or ``backward`` that reads and computes least among those that fit into the shared memory
    of a block, if any."""
    element_bytes, heads, head_dim, batch, seqlen, seqlen_k, *_ = size
    whole = round_up(max(seqlen_k, 1), 16)
    # Keys and values are read once for every block: taller ones read less, as long as they still occupy the card.
    small = element_bytes == 2 and heads <= 16 and head_dim <= 64
    # Halves of a tile too, where keys are resident; 40 rows have much to compute for what they save at head_dim 64, and
    # more than there are registers for with dropout.
    candidates: tuple[int, ...] = (16,)
    if kernel == "forward" and small:
        candidates = (40, 32, 24, 16) if head_dim <= 32 and not size.dropout else (32, 24, 16)
    # Of as many blocks, those with the fewest rows.
    by_blocks = sorted((-(-seqlen // rows), rows) for rows in candidates)
    heights = [rows for blocks, rows in by_blocks if rows == 16 or batch * blocks >= multiprocessors]
    of_tiles = [rows for rows in heights if rows in (16, 32)]
    if size.masked:
        heights = of_tiles

    def fit(rows: int, keys: int, warps: int) -> Plan | None:
        taken = _shared_bytes(kernel, size, rows, keys, warps)
        return Plan(rows, keys, keys >= whole, warps, taken) if taken <= shared_bytes else None

    all_warps = -(-heads // -(-heads // MOST_WARPS))
    # What the backward pass has to do with dropout takes more registers.
    few_warps = min(all_warps, 8) if kernel == "backward" and size.dropout else all_warps
    for rows in heights:
        if whole <= MOST_KEYS and (plan := fit(rows, whole, few_warps)):
            return plan
    # So do tiles of keys, with many heads or where keys stream through stages.
    if kernel == "backward" and not small:
        few_warps = min(all_warps, 8)
    # Fewer warps leave more room for maps.
    for warps in sorted({-(-few_warps // turns) for turns in range(1, few_warps + 1)}, reverse=True):
        least = min(64 if warps == few_warps else 16, whole)
        for rows in of_tiles:
            for keys in range(min(MOST_KEYS, whole), least - 1, -16):
                if plan := fit(rows, keys, warps):
                    return plan
    return None


# Of a block, which leaves each lane 168 registers.
MOST_WARPS = 12
# Whose maps a block holds; longer rows come in several tiles, which are then the same for all lengths.
MOST_KEYS = 1024


class ProductPlan(NamedTuple):
    """How products.cu cuts the keys: a block owns up to ``keys`` of them. ``blocks``: for a sample and head, chunks of
    columns and both gradients included."""

    keys: int
    warps: int
    shared_bytes: int
    blocks: int

    @property
    def constants(self) -> tuple[tuple[str, int], ...]:
        """As csrc/cuda takes them."""
        return tuple((f"REATTN_{name.upper()}", getattr(self, name)) for name in ("keys", "warps", "shared_bytes"))


def plan_products(size: Size, shared_bytes: int) -> ProductPlan:
    """A warp owns 32 keys, or some less; a block 8 warps where there are keys for them, and shared memory."""
    element_bytes, _, head_dim, _, _, seqlen_k, *_ = size
    rows, stages = (16, 3) if element_bytes == 4 else (32, 4)

    def plan(keys: int, warps: int) -> ProductPlan:
        taken = stages * rows * ((keys + min(round_up(head_dim, 16), OUT_DIMS)) * element_bytes + 32)
        return ProductPlan(keys, warps, taken, 2 * -(-head_dim // OUT_DIMS) * -(-seqlen_k // keys))

    if element_bytes == 4:
        return plan(128, 4)
    wide = plan(min(round_up(seqlen_k, 16), 256), 8 if seqlen_k > 128 else 4)
    return wide if wide.shared_bytes <= shared_bytes else plan(128, 4)


class BackwardCut(NamedTuple):
    """The parts of a backward pass, and elements of the workspace: for each of two maps, and for each of two sums where
    rows come in several parts."""

    parts: tuple[Part, ...]
    products: ProductPlan
    maps: int
    sums: int


def cut_backward(size: Size, shared_bytes: int, multiprocessors: int) -> BackwardCut:
    """See :func:`reattn.backends.common.cut_workspace`."""
    element_bytes, heads, head_dim, batch, seqlen, seqlen_k, *_ = size
    keys = round_up(seqlen_k, 16)
    # products has a block for each sample and head in the grid's second dimension.
    most_samples = 65535 // heads
    parts = cut_workspace(2 * heads * keys * element_bytes, batch, seqlen, 16, multiprocessors, 16, most_samples)
    first = parts[0]
    sums = heads * seqlen_k * head_dim if first.rows < seqlen else 0
    return BackwardCut(parts, plan_products(size, shared_bytes), first.samples * heads * first.rows * keys, sums)
