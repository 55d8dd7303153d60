"""Philox-4x32-10: a counter-based random number generator.

Math     ten rounds on four 32-bit words c and two key words k; one round is
             (hi_a, lo_a) = 0xD2511F53 * c0        (hi_b, lo_b) = 0xCD9E8D57 * c2
             c = (hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a)
         and before the next one k = (k0 + 0x9E3779B9, k1 + 0xBB67AE85), all modulo 2^32
Shapes   a counter is four words, a result is four words of 32 random bits each
Error    none: integers, equal in the three implementations below
Source   Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011;
         the test is the published vectors of its library, Random123

Example  counter (0, 0, 0, 0) and key (0, 0) give (6627e8d5, e169c58d, bc57ac4c, 9b00dbd8).

A value depends on its counter and key alone, never on what ran before. That is why compression
draws its noise here: it leaves the global generators, and so dropout masks, as they were.
"""

from torch import Tensor

ROUNDS = 10
MULTIPLIER_A = 0xD2511F53
MULTIPLIER_B = 0xCD9E8D57
WEYL_0 = 0x9E3779B9
WEYL_1 = 0xBB67AE85
WORD = 0xFFFFFFFF


def philox_ref(
    counter: tuple[Tensor, int, int, int], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four output words for counters that differ in their first word.

    `counter[0]` is int64, any shape, and holds values in [0, 2^32); the other words and the key
    are ints in the same range. Returns four int64 tensors of that shape, values in [0, 2^32).
    """
    c0 = counter[0]
    c1, c2, c3 = (c0.new_full((), word) for word in counter[1:])
    k0, k1 = key
    for _ in range(ROUNDS):
        # A product of two words may pass 2^63. int64 wraps, which keeps all 64 bits; the mask
        # after the arithmetic shift then drops the copies of the sign.
        a, b = c0 * MULTIPLIER_A, c2 * MULTIPLIER_B
        c0, c1 = ((b >> 32) & WORD) ^ c1 ^ k0, b & WORD
        c2, c3 = ((a >> 32) & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + WEYL_0) & WORD, (k1 + WEYL_1) & WORD
    return c0, c1.expand_as(c0), c2, c3.expand_as(c0)
