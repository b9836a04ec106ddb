"""The samples of each step: a pure function of (seed, step), in constant time and memory per position.

The order of an epoch is a keyed permutation of the ids 0 … samples-1. It is evaluated only at the positions that are
needed and is never stored. Step s uses the positions [s·G, (s+1)·G) of its epoch (G = global batch), split into M
micro-batches of fixed size. Rank r of `world` takes the micro-batches r, r + world, …, so the result of a step does not
depend on the number of ranks.

Repeated augmentation (Hoffer et al., arXiv 1901.09335; `repeats` = r > 1) uses each sample r times in a row, augmented
differently: use u of an epoch is copy u % r of the sample at position u // r. A step distributes its G uses round-robin
over its micro-batches, so the copies of a sample lie in different ones. An epoch keeps its N // G steps, as in timm's
RASampler, and so uses N / r samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .randomness import Stream, bits, fold, integers, make_key

# Block-wise order: the number of contiguous ids in a block, and the number of positions that are shuffled together.
BLOCK = 256
POOL = 64 * BLOCK

# Rounds of the Feistel network. Luby and Rackoff (1988) prove 4 sufficient for large domains; small domains need more.
ROUNDS = 12


@dataclass(frozen=True)
class Order:
    """The order of `samples` samples under `seed`, in global batches that consist of micro-batches.

    shuffle: "full" draws the sample of each position from the whole dataset, "block" from a pool of 64 blocks of 256
    contiguous ids, so that reads stay local. Steps count from 0: step s follows s finished optimizer steps. Raises
    ValueError for sizes that do not fit together.
    """

    seed: int
    samples: int
    global_batch: int
    micro_batch: int
    shuffle: Literal["full", "block"] = "full"
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.global_batch % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide global_batch {self.global_batch}")
        if self.samples < self.global_batch:
            raise ValueError(
                f"the dataset has {self.samples} samples, fewer than one global_batch of {self.global_batch}: set a "
                "smaller train.global_batch"
            )

    @property
    def groups(self) -> tuple[int, ...]:
        """The numbers of samples of which micro-batches are made apart."""
        return (self.samples,)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch. The remaining samples, different ones in each epoch, are not used."""
        return self.samples // self.global_batch

    @property
    def micro_batches(self) -> int:
        """M, the micro-batches of one step, over all ranks."""
        return self.global_batch // self.micro_batch

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def ids(self, step: int) -> np.ndarray:
        """The sample ids of a step, int64 [global_batch]."""
        return self.draws(step, range(self.micro_batches)).ravel() % self.samples

    def draws(self, step: int, indices: Sequence[int]) -> np.ndarray:
        """The draws of some micro-batches of a step, int64 [len(indices), micro_batch].

        A draw is id + samples · copy, so it identifies the use of a sample if `repeats` is more than 1.
        """
        row, column = np.asarray(indices, np.int64)[:, None], np.arange(self.micro_batch)
        slots = row * self.micro_batch + column if self.repeats == 1 else column * self.micro_batches + row
        positions, copy = np.divmod((step % self.steps_per_epoch) * self.global_batch + slots.ravel(), self.repeats)
        key = make_key(self.seed, Stream.ORDER, self.epoch_of(step))
        shuffled = block_permute if self.shuffle == "block" else permute
        return (shuffled(key, self.samples, positions) + self.samples * copy).reshape(-1, self.micro_batch)

    def replacement(self, sample: int, attempt: int) -> int:
        """The id to use instead of an unreadable sample. attempt: from 0; the replacement may be unreadable too."""
        return make_key(self.seed, Stream.REPLACEMENT, sample, attempt) % self.samples

    def share(self, rank: int, world: int) -> range:
        """The indices of the micro-batches that `rank` takes in every step.

        Raises ValueError if `world` does not divide M.
        """
        total = self.micro_batches
        if total % world:
            fitting = ", ".join(str(size) for size in range(1, total + 1) if total % size == 0)
            raise ValueError(
                f"{world} ranks cannot share the {total} micro-batches of a step "
                f"(global_batch {self.global_batch} / micro_batch {self.micro_batch}) evenly; "
                f"world sizes that can: {fitting}"
            )
        return range(rank, total, world)


def block_permute(key: int, size: int, positions: np.ndarray) -> np.ndarray:
    """A keyed permutation of 0 … size-1 with local reads, evaluated at `positions` (int64 [n]); returns int64 [n].

    The ids form a ring. From a random id on, it is cut into blocks of BLOCK contiguous ids and a shorter rest, which
    stays last. The full blocks are permuted, then each POOL of positions is permuted within itself. The last pool is
    shorter.
    """
    result = positions.copy()
    pools = positions // POOL
    for pool in np.unique(pools).tolist():
        inside, start = pools == pool, pool * POOL
        pool_key = make_key(key, Stream.ORDER, 2, pool)
        result[inside] = start + permute(pool_key, min(POOL, size - start), positions[inside] - start)
    block, place = np.divmod(result, BLOCK)
    blocks = size // BLOCK
    if blocks:
        full = block < blocks
        block[full] = permute(make_key(key, Stream.ORDER, 1), blocks, block[full])
    return (make_key(key, Stream.ORDER, 0) % size + block * BLOCK + place) % size


def permute(key: int, size: int, positions: np.ndarray) -> np.ndarray:
    """A keyed permutation of 0 … size-1, evaluated at `positions` (int64 [n], each in [0, size)); returns int64 [n].

    An alternating Feistel network on pairs (left, right) in Z_a × Z_b, with b = ⌈√size⌉ and a·b the smallest multiple
    of b that is at least `size`, and cycle walking (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002):
    results outside 0 … size-1 are permuted again until they lie inside. Because a·b - size < b ≈ √size, few results do.
    """
    columns = math.isqrt(size - 1) + 1  # b = ceil(sqrt(size)); size 1 gives 1
    rows = -(-size // columns)
    round_keys = bits(np.array([key], np.int64), np.arange(ROUNDS, dtype=np.int64))
    result = _feistel(round_keys, rows, columns, positions)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = _feistel(round_keys, rows, columns, result[outside])
        outside = outside[result[outside] >= size]
    return result


def _feistel(round_keys: np.ndarray, rows: int, columns: int, values: np.ndarray) -> np.ndarray:
    left, right = np.divmod(values, columns)
    for number in range(0, ROUNDS, 2):
        left = (left + integers(fold(round_keys[number : number + 1], right), rows)) % rows
        right = (right + integers(fold(round_keys[number + 1 : number + 2], left), columns)) % columns
    return left * columns + right
