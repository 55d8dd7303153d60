"""Sixteen elements at once, as LLVM's vectors, for loops that numba cannot spell and LLVM not find.

A loop that reads some arrays and writes another begins by comparing their addresses before it may
go over to vectors. For the 64 elements of a quarter of a group that takes longer than the loop
itself. Vectors that are spelled out need no comparison. Where registers hold fewer than sixteen
elements LLVM takes several for each.

`Floats` are float32, `Words` are 32-bit words: values within a compiled loop, never outside it.
Arrays are those of numba_intrinsics.typed_array, and of unsigned integers.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from .philox import MULTIPLIER_A, MULTIPLIER_B, ROUNDS, WEYL_0, WEYL_1, WORD

LANES = 16

_INT16, _INT32, _INT64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_HALVES = ir.VectorType(_INT16, LANES)
_WORDS = ir.VectorType(_INT32, LANES)
# Of a Philox block: a word is the noise of two elements.
_NARROW = ir.VectorType(_INT32, LANES // 2)
_WIDE = ir.VectorType(_INT64, LANES // 2)


class Floats(types.Type):
    """Sixteen float32."""

    llvm = _FLOATS

    def __init__(self) -> None:
        super().__init__(name="dpmem.Floats")


class Words(types.Type):
    """Sixteen words of 32 bits."""

    llvm = _WORDS

    def __init__(self) -> None:
        super().__init__(name="dpmem.Words")


@register_model(Floats)
@register_model(Words)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, of: Any) -> None:
        super().__init__(manager, of, of.llvm)


_floats, _words = Floats(), Words()


def _emitted(signature: Any, emit: Callable[..., Any]) -> tuple[Any, Any]:
    """What an intrinsic returns that `emit(builder, *arguments)` writes."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return emit(builder, *arguments)

    return signature, generate


def _constant(vector: Any, *values: int) -> Any:
    """These values in turn."""
    return ir.Constant(vector, [values[i % len(values)] for i in range(vector.count)])


def _splat(builder: Any, vector: Any, value: Any) -> Any:
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, value, _INT32(0))
    return builder.shuffle_vector(first, nothing, _constant(ir.VectorType(_INT32, vector.count), 0))


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    name = f"llvm.fma.v{LANES}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [x, y, z])


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Of sixteen elements from `index` on, as stored; the vector's type and its alignment."""
    data = context.make_array(array_type)(context, builder, array).data
    vector = ir.VectorType(data.type.pointee, LANES)
    address = builder.bitcast(builder.gep(data, [index]), vector.as_pointer())
    return address, array_type.dtype.bitwidth // 8


def _load(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    address, align = _address(context, builder, array_type, array, index)
    return builder.load(address, align=align)


@intrinsic
def load_floats(_context: Any, array: Any, index: Any) -> Any:
    """array[index : index + 16]; from bfloat16 and float16, too."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        stored = _load(context, builder, signature.args[0], *arguments)
        if array.dtype == types.float32:
            return stored
        if array.dtype == types.uint16:
            high = builder.shl(builder.zext(stored, _WORDS), _constant(_WORDS, 16))
            return builder.bitcast(high, _FLOATS)
        return builder.fpext(builder.bitcast(stored, ir.VectorType(ir.HalfType(), LANES)), _FLOATS)

    return _floats(array, types.intp), generate


@intrinsic
def store_floats(_context: Any, array: Any, index: Any, values: Any) -> Any:
    """array[index : index + 16] = values; rounded to nearest even, a NaN stays a NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, index, values = arguments
        address, align = _address(context, builder, signature.args[0], target, index)
        if array.dtype == types.uint16:
            bits = builder.bitcast(values, _WORDS)
            tie = builder.and_(builder.lshr(bits, _constant(_WORDS, 16)), _constant(_WORDS, 1))
            rounded = builder.add(builder.add(bits, _constant(_WORDS, 0x7FFF)), tie)
            # A carry must not turn a NaN into something else.
            is_nan = builder.fcmp_unordered("uno", values, values)
            rounded = builder.select(is_nan, _constant(_WORDS, 0x7FC00000), rounded)
            values = builder.trunc(builder.lshr(rounded, _constant(_WORDS, 16)), _HALVES)
        elif array.dtype == types.int16:
            halves = builder.fptrunc(values, ir.VectorType(ir.HalfType(), LANES))
            values = builder.bitcast(halves, _HALVES)
        builder.store(values, address, align=align)
        return context.get_dummy_value()

    return types.void(array, types.intp, _floats), generate


def _prefetched(array: Any, *, to_write: int) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, _ = _address(context, builder, signature.args[0], *arguments)
        address = builder.bitcast(address, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [address.type, _INT32, _INT32, _INT32])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # Into the nearest cache, of data.
        builder.call(fetch, [address, _INT32(to_write), _INT32(3), _INT32(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def will_read(_context: Any, array: Any, index: Any) -> Any:
    """Let the processor fetch array[index : index + 16], which may lie past the end."""
    return _prefetched(array, to_write=0)


@intrinsic
def will_write(_context: Any, array: Any, index: Any) -> Any:
    """The same of elements that will be written."""
    return _prefetched(array, to_write=1)


@intrinsic
def load_words(_context: Any, array: Any, index: Any) -> Any:
    """array[index : index + 16] of unsigned integers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(_load(context, builder, signature.args[0], *arguments), _WORDS)

    return _words(array, types.intp), generate


@intrinsic
def store_words(_context: Any, array: Any, index: Any, words: Any) -> Any:
    """array[index : index + 16] = words; of each the low bits that an element has."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, index, words = arguments
        address, align = _address(context, builder, signature.args[0], target, index)
        builder.store(builder.trunc(words, address.type.pointee), address, align=align)
        return context.get_dummy_value()

    return types.void(array, types.intp, _words), generate


@intrinsic
def field(_context: Any, words: Any, shift: Any, mask: Any) -> Any:
    """(words >> shift) & mask"""

    def emit(builder: Any, words: Any, shift: Any, mask: Any) -> Any:
        shifted = builder.lshr(words, _splat(builder, _WORDS, shift))
        return builder.and_(shifted, _splat(builder, _WORDS, mask))

    return _emitted(_words(_words, types.uint32, types.uint32), emit)


@intrinsic
def either(_context: Any, a: Any, b: Any) -> Any:
    """a | b"""
    return _emitted(_words(_words, _words), lambda builder, a, b: builder.or_(a, b))


@intrinsic
def scaled(_context: Any, words: Any, scale: Any, zero: Any) -> Any:
    """words * scale + zero with one rounding, of words below 2^24."""

    def emit(builder: Any, words: Any, scale: Any, zero: Any) -> Any:
        number = builder.sitofp(words, _FLOATS)
        return _fma(
            builder, number, _splat(builder, _FLOATS, scale), _splat(builder, _FLOATS, zero)
        )

    return _emitted(_floats(_words, types.float32, types.float32), emit)


@intrinsic
def rounded(_context: Any, values: Any, zero: Any, inverse: Any, base: Any, noise: Any) -> Any:
    """The bits of (values - zero) * inverse + the float whose bits are base | noise."""

    def emit(builder: Any, values: Any, zero: Any, inverse: Any, base: Any, noise: Any) -> Any:
        addend = builder.bitcast(builder.or_(noise, _splat(builder, _WORDS, base)), _FLOATS)
        offset = builder.fsub(values, _splat(builder, _FLOATS, zero))
        total = _fma(builder, offset, _splat(builder, _FLOATS, inverse), addend)
        return builder.bitcast(total, _WORDS)

    return _emitted(_words(_floats, types.float32, types.float32, types.uint32, _words), emit)


def _philox(builder: Any, counter: list[Any], key: list[Any]) -> list[Any]:
    """Eight blocks of philox.py; a word is the low half of its lane.

    A product takes 64 bits a lane, and to go back to 32 in between longer than the product.
    """
    word, high = _constant(_WIDE, WORD), _constant(_WIDE, 32)
    c0, c1, c2, c3 = counter
    for number in range(ROUNDS):
        k0 = builder.add(key[0], _constant(_WIDE, WEYL_0 * number & WORD))
        k1 = builder.add(key[1], _constant(_WIDE, WEYL_1 * number & WORD))
        a = builder.mul(builder.and_(c0, word), _constant(_WIDE, MULTIPLIER_A))
        b = builder.mul(builder.and_(c2, word), _constant(_WIDE, MULTIPLIER_B))
        c0 = builder.xor(builder.xor(builder.lshr(b, high), c1), k0)
        c2 = builder.xor(builder.xor(builder.lshr(a, high), c3), k1)
        c1, c3 = b, a
    return [c0, c1, c2, c3]


@intrinsic
def draw(_context: Any, counter: Any, noise: Any) -> Any:
    """The Philox blocks of counters from `counter` on, eight: of each quarter 16 halves of words.

    `noise` is what Noise.words gives.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, others = arguments
        words = cgutils.unpack_tuple(builder, others, 5)
        key_low, key_high, *rest = (
            builder.zext(_splat(builder, _NARROW, word), _WIDE) for word in words
        )
        counters = builder.add(_splat(builder, _NARROW, first), _constant(_NARROW, *range(8)))
        counter = [builder.zext(counters, _WIDE), *rest]
        quarters = []
        for block in _philox(builder, counter, [key_low, key_high]):
            # Little-endian, as the format is: the low half of a word comes first.
            halves = builder.bitcast(builder.trunc(block, _NARROW), _HALVES)
            quarters.append(builder.zext(halves, _WORDS))
        return context.make_tuple(builder, signature.return_type, quarters)

    return types.UniTuple(_words, 4)(types.uint32, noise), generate


@intrinsic
def to_15_bits(_context: Any, halves: Any) -> Any:
    """The low 15 bits of each low half of a word, the high 15 of each high half."""

    def emit(builder: Any, halves: Any) -> Any:
        return builder.and_(
            builder.lshr(halves, _constant(_WORDS, 0, 1)), _constant(_WORDS, 0x7FFF)
        )

    return _emitted(_words(_words), emit)
