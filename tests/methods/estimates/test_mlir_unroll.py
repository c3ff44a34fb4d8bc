"""Loops that are unrolled: both texts say the same, labels know the registers, the largest factor that fits is taken."""

import shutil

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from broadsheet.methods.estimates.mlir_cost_model.labels import machine
from broadsheet.methods.estimates.mlir_cost_model.stablehlo import parse
from broadsheet.methods.estimates.mlir_cost_model.unroll import (
    FACTORS,
    KERNELS,
    LANES,
    LENGTH,
    STRIDE,
    Compiled,
    choose,
    dots,
    kernels,
    rows,
    run_times,
    stencil,
)

runs = pytest.mark.skipif("avx" not in machine(), reason="this CPU has no AVX2 to run the code with")


@runs
@pytest.mark.parametrize("factor", [1, 4])
def test_unrolled_code_computes_the_same(factor):
    kernel = dots(2, 1)
    code = Compiled.of(kernel.llvm(factor), kernel.arrays + 1, "haswell")
    code.seconds(1)
    arrays = code.arrays.reshape(-1, STRIDE)
    sums = arrays[3, : factor * 2 * LANES].reshape(factor, 2, LANES).sum((0, 2))
    x = arrays[0, :LENGTH] + np.float32(0.5)
    assert np.allclose(sums, [x @ arrays[1, :LENGTH], x @ arrays[2, :LENGTH]], rtol=1e-4, atol=1e-3)


@runs
def test_a_stencil_is_a_correlation():
    kernel = stencil(2, 0)
    code = Compiled.of(kernel.llvm(2), 2, "haswell")
    code.seconds(1)
    source, found = code.arrays.reshape(2, STRIDE)
    expected = sum(weight * source[n : n + LENGTH] for n, weight in enumerate(kernel.constants))
    assert np.allclose(found[:LENGTH], expected, atol=1e-5)


@pytest.mark.parametrize("make", KERNELS)
def test_affine_text_has_what_the_code_has(make):
    kernel = make(3, 2)
    program = parse(kernel.text(2))
    (loop,) = [one for one in program.walk() if one.name == "affine.for"]
    written = [one.name for one in loop.regions[0].operations]
    ir = kernel.llvm(2)
    assert written.count("affine.vector_load") == ir.count(" = load ")
    assert written.count("math.fma") == ir.count("call <8 x float> @llvm.fma")
    assert len(loop.results) == 2 * kernel.sums
    assert written.count("arith.mulf") == ir.count(" fmul ")


@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump (binutils) is not installed")
def test_more_copies_need_more_registers():
    found = {cpu: [row["labels"]["spills"] for row in rows([dots(3, 1)], cpu)] for cpu in ("haswell", "skylake-avx512")}
    assert found["haswell"][0] == 0 < found["haswell"][-1]
    assert choose(found["haswell"]) <= choose(found["skylake-avx512"])
    assert len({row["id"] for row in rows([dots(3, 1)])}) == len(FACTORS)


def test_the_largest_factor_that_fits():
    assert FACTORS[choose([0, 0, 0.4, 3, 0])] == 4
    assert choose([2, 0, 0, 0, 0]) == 0


@runs
def test_times_are_of_elements():
    ((even, odd),) = run_times([(dots(1, 0), 1)], rounds=4)
    assert 0.01 < even < 20
    assert 0.01 < odd < 20
    assert len(kernels()) == 24 * len(KERNELS)
