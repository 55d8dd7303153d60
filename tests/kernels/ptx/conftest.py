"""Runs a few lines of PTX over arrays of operands, one thread per element."""

from collections.abc import Callable

import numpy as np
import pytest

from verify.ptx import parse, run

THREADS = 32
Snippet = Callable[..., np.ndarray]

_TEMPLATE = """
.version 8.7
.target sm_100a
.address_size 64
{module}
.visible .entry snippet({parameters})
.reqntid {threads}
{{
  .reg .pred %p<8>;
  .reg .b16 %h<8>;
  .reg .b32 %r<8>;
  .reg .b64 %q<8>;
  .reg .b32 %index<4>;
  .reg .b64 %address<16>;
  {registers}
  mov.u32 %index0, %ctaid.x;
  mov.u32 %index1, %tid.x;
  mad.lo.s32 %index2, %index0, {threads}, %index1;
  {loads}
  {body}
  {stores}
  ret;
}}
"""


def _access(number: int, array: np.ndarray, statement: str) -> str:
    return (
        f"ld.param.u64 %address{number}, [p{number}];\n"
        f"mad.wide.s32 %address{number}, %index2, {array.itemsize}, %address{number};\n"
        f"{statement};\n"
    )


@pytest.fixture
def execute() -> Snippet:
    """execute(body, *inputs, out=dtype): inputs are in %a, %b, … and the result in %x.

    Every input is an array with one element per thread. %p, %h, %r and %q with a digit are free
    registers of 1, 16, 32 and 64 bits.
    """

    def execute(
        body: str,
        *inputs: np.ndarray,
        out: type = np.uint32,
        threads: int = THREADS,
        module: str = "",
        shared_bytes: int | None = None,
    ) -> np.ndarray:
        size = max((array.size for array in inputs), default=threads)
        blocks = -(-size // threads)
        padded = [np.resize(array, blocks * threads) for array in inputs]
        result = np.zeros(blocks * threads, out)
        loads, registers = "", f".reg .b{result.itemsize * 8} %x;"
        for number, (name, array) in enumerate(zip("abcdefg", padded, strict=False)):
            bits = array.itemsize * 8
            registers += f" .reg .b{bits} %{name};"
            statement = f"ld.global.b{bits} %{name}, [%address{number}]"
            loads += _access(number, array, statement)
        last = len(padded)
        text = _TEMPLATE.format(
            module=module,
            parameters=", ".join(f".param .u64 p{number}" for number in range(last + 1)),
            threads=threads,
            registers=registers,
            loads=loads,
            body=body,
            stores=_access(last, result, f"st.global.b{result.itemsize * 8} [%address{last}], %x"),
        )
        run(parse(text), (blocks,), [*padded, result], shared_bytes=shared_bytes)
        return result[:size]

    return execute
