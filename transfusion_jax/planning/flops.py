"""Multiply-adds of the two operations that a TPU's matrix unit runs, counted as two floating-point
operations each."""

import math
import re

import numpy as np

from transfusion_jax.planning.hlo import Computation, Instruction


def flops(instruction: Instruction, computation: Computation) -> float:
    """Of a dot or a convolution; everything else counts nothing."""
    if instruction.operation == "dot":
        return dot_flops(instruction, computation)
    if instruction.operation == "convolution":
        return convolution_flops(instruction, computation)
    return 0.0


def dot_flops(dot: Instruction, computation: Computation) -> float:
    (left,) = computation.instructions[dot.operands[0]].result
    contracted = re.findall(r"\d+", dot.attribute("lhs_contracting_dims"))
    return (
        2.0 * math.prod(dot.result[0].dims) * math.prod(left.dims[int(dim)] for dim in contracted)
    )


def convolution_flops(convolution: Instruction, computation: Computation) -> float:
    """Padding and holes count nothing.

    XLA for TPU writes a dot as a convolution, and a batched one with a window of the size of the
    batch that slides over so much padding that each output position meets one element.
    """
    source, kernel = (
        computation.instructions[name].result[0].dims for name in convolution.operands
    )
    output = convolution.result[0].dims
    source_labels, kernel_labels, output_labels = re.split(
        "_|->", convolution.attribute("dim_labels")
    )
    window = window_fields(convolution)
    multiplied = (
        output[output_labels.index("b")]
        * output[output_labels.index("f")]
        * kernel[kernel_labels.index("i")]
    )
    for axis in range(len(output) - 2):
        label = str(axis)
        lengths = (
            dims[labels.index(label)]
            for dims, labels in ((source, source_labels), (output, output_labels))
        )
        multiplied *= meetings(*lengths, **{name: values[axis] for name, values in window.items()})
    return 2.0 * multiplied


def window_fields(convolution: Instruction) -> dict[str, list[int]]:
    """`{size=12x2 pad=11_11x0_0 rhs_reversal=1x0}`: each field by axis; of the padding the low
    side."""
    fields = dict(re.findall(r"(\w+)=([\d_x-]+)", convolution.attribute("window")))
    return {
        name: [int(value.split("_")[0]) for value in values.split("x")]
        for name, values in fields.items()
    }


def meetings(
    source: int,
    output: int,
    *,
    size: int,
    pad: int = 0,
    stride: int = 1,
    lhs_dilate: int = 1,
    rhs_dilate: int = 1,
    rhs_reversal: int = 0,
) -> int:
    """In how many pairs of output and window position the window meets an element of the source,
    along one axis."""
    at = np.arange(output)[:, None] * stride + np.arange(size) * rhs_dilate - pad
    return int(np.sum((at >= 0) & (at < source * lhs_dilate) & (at % lhs_dilate == 0)))
