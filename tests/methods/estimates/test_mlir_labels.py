"""Labels: live bytes against MLIR's own use lists, spills of kernels with known register pressure, XLA's reports, the
clock."""

import json
import shutil

import numpy as np
import pytest
import torch
from mlir_interpreter import interpreted_peak

from broadsheet.methods.estimates.mlir_cost_model import corpus, order
from broadsheet.methods.estimates.mlir_cost_model.capture import capture, to_linalg
from broadsheet.methods.estimates.mlir_cost_model.cost_model import values
from broadsheet.methods.estimates.mlir_cost_model.generate import Builder, generate, whole
from broadsheet.methods.estimates.mlir_cost_model.labels import (
    EMPTY,
    compile_llvm,
    compile_text,
    count_kernels,
    label,
    label_for,
    machine,
    measure,
    peak_live_bytes,
    random_arguments,
    read_assembly,
)  # fmt: skip
from broadsheet.methods.estimates.mlir_cost_model.stablehlo import parse
from broadsheet.methods.estimates.mlir_cost_model.templates import TEMPLATES


def test_peak_by_hand():
    """x (16 B) is held; at the add %1, %0 and the sum are live; at the last all but %1 ... 16 * 4."""
    kind = "tensor<4xf32>"
    text = f"""func.func @main(%x: {kind}) -> {kind} {{
      %0 = stablehlo.tanh %x : {kind}
      %1 = stablehlo.tanh %0 : {kind}
      %2 = stablehlo.add %1, %0 : {kind}
      %3 = stablehlo.add %2, %2 : {kind}
      return %3 : {kind}
    }}"""
    assert peak_live_bytes(parse(text)) == 16 * 4
    assert peak_live_bytes(parse(text.replace("add %2, %2", "add %2, %0"))) == 16 * 4
    assert peak_live_bytes(parse(text.replace("add %1, %0", "add %1, %1"))) == 16 * 3


def test_peak_counts_what_a_region_makes():
    kind = "tensor<4xf32>"
    text = f"""func.func @main(%x: {kind}, %n: tensor<i32>) -> {kind} {{
      %0 = stablehlo.tanh %x : {kind}
      %1:2 = stablehlo.while(%i = %n, %y = %x) : tensor<i32>, {kind}
       cond {{
        %2 = stablehlo.compare LT, %i, %n : (tensor<i32>, tensor<i32>) -> tensor<i1>
        stablehlo.return %2 : tensor<i1>
      }} do {{
        %2 = stablehlo.tanh %y : {kind}
        %3 = stablehlo.add %2, %0 : {kind}
        stablehlo.return %i, %3 : tensor<i32>, {kind}
      }}
      return %1#1 : {kind}
    }}"""
    arguments, outer, results, held, inner = 20, 16, 20, 20, 32
    assert peak_live_bytes(parse(text)) == arguments + outer + results + held + inner


def test_peak_of_generated_programs_is_that_of_an_independent_interpreter():
    pytest.importorskip("jax", reason="the interpreter walks MLIR's own operations")
    rng = np.random.default_rng(0)
    texts = order.programs(rng, 170)
    for _, graph in generate(3):
        text = capture(graph.function(), *graph.arguments())
        if "call @" not in text:
            texts.append(text)
        if len(texts) == 200:
            break
    assert [peak_live_bytes(parse(text)) for text in texts] == [interpreted_peak(text) for text in texts]


def kernel(live: int) -> str:
    """LLVM IR: ``live`` sums of 8 floats are carried through a loop, and none can be folded into another."""
    lines = ["define void @k(ptr noalias %in, ptr noalias %out, i64 %n) {", "entry:", "  br label %loop", "loop:"]
    lines.append("  %i = phi i64 [0, %entry], [%next, %loop]")
    lines += [f"  %s{j} = phi <8 x float> [zeroinitializer, %entry], [%t{j}, %loop]" for j in range(live)]
    lines += ["  %p = getelementptr <8 x float>, ptr %in, i64 %i", "  %x = load <8 x float>, ptr %p, align 32"]
    lines += [f"  %q{j} = fmul <8 x float> %s{j}, %x" for j in range(live)]
    lines += [f"  %t{j} = fadd <8 x float> %q{j}, %s{(j + 1) % live}" for j in range(live)]
    lines += [
        "  %next = add i64 %i, 1",
        "  %more = icmp ult i64 %next, %n",
        "  br i1 %more, label %loop, label %done",
        "done:",
    ]
    for j in range(live):
        lines.append(f"  %o{j} = getelementptr <8 x float>, ptr %out, i64 {j}")
        lines.append(f"  store <8 x float> %t{j}, ptr %o{j}, align 32")
    return "\n".join([*lines, "  ret void", "}"])


@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump (binutils) is not installed")
def test_spills_of_known_register_pressure():
    """AVX2 has 16 vector registers: 8 live sums fit, 40 do not; AVX-512 has 32."""
    pytest.importorskip("llvmlite")
    few, many = compile_llvm(kernel(8)), compile_llvm(kernel(40))
    assert few.spills == 0
    assert many.spills >= 2 * (40 - 16)
    assert many.frame_bytes > 0
    assert few.vector_util == many.vector_util == 1
    assert compile_llvm(kernel(20), "skylake-avx512").spills == 0 < compile_llvm(kernel(20)).spills


def test_assembly_is_counted_by_kind():
    text = """
   0:\tpush   %rbp
   1:\tvmovaps %ymm0,-0x20(%rbp)
   2:\tvmovaps 0x40(%rsp),%ymm1
   3:\tvaddps %ymm1,%ymm0,%ymm2
   4:\tvfmadd213ss %xmm1,%xmm0,%xmm2
   5:\tmov    (%rdi),%rax
   6:\tmov    0x18(%rdi,%rcx,8),%rax
   7:\tsub    $0x80,%rsp
   8:\tnopl   0x0(%rax)
   9:\tvmovmskps %ymm0,%eax
   a:\tret
"""
    code = read_assembly(text)
    assert (code.instructions, code.spills, code.frame_bytes, code.vector, code.scalar) == (10, 2, 128, 1, 1)
    assert code.vector_util == 0.5
    assert read_assembly("").vector_util is None


def test_kernels_of_optimised_text():
    text = """HloModule m
%fused_computation (p: f32[4]) -> f32[4] {
  ROOT %tanh = f32[4]{0} tanh(%p)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %f = f32[4]{0} fusion(%a), kind=kLoop, calls=%fused_computation
  ROOT %dot.1 = f32[4]{0} dot(%f, %a), lhs_contracting_dims={0}
}
"""
    assert count_kernels(text) == (2, 1)


@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump (binutils) is not installed")
def test_labels_of_a_program():
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp

    text = capture(lambda x, w: jax.nn.softmax(jnp.tanh(x @ w)), jnp.ones((32, 64)), jnp.ones((64, 128)))
    (found,) = label([text])
    assert found["peak_bytes"] >= 4 * (32 * 64 + 64 * 128 + 2 * 32 * 128)
    assert found["kernels"] >= found["fusions"] >= 1
    assert found["instructions"] > 50
    assert 0 <= found["vector_util"] <= 1
    assert found["flops"] >= 2 * 32 * 64 * 128
    assert found["time"] > 0
    assert found["noise"] >= 0
    empty = compile_text(EMPTY, inspect=False)
    assert empty.code.instructions == 0
    (timing,) = measure([empty], rounds=4)
    assert timing.time < 200
    assert timing.above(timing.time).time == 0.1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump (binutils) is not installed")
@pytest.mark.skipif("avx" not in machine(), reason="this CPU has one instruction set to compile for")
def test_an_older_instruction_set_needs_more_instructions():
    pytest.importorskip("jax")
    import jax.numpy as jnp

    text = capture(lambda x: jnp.tanh(x) * jnp.exp(x), jnp.ones((64, 256)))
    (wide,), (narrow,) = label([text]), label_for([text], "SSE4_2")
    assert narrow["instructions"] > 1.3 * wide["instructions"]


def test_programs_are_timed_by_turns():
    """A disturbance of one round leaves the lower quartile as it is, for whomever it meets."""
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp

    large, small = (
        compile_text(capture(lambda x: jnp.sin(x) @ x, jax.ShapeDtypeStruct((n, n), "float32")), inspect=False)
        for n in (256, 8)
    )
    slow, quick = measure([large, small], rounds=8)
    assert slow.time > 3 * quick.time
    assert slow.again > 3 * quick.again


def test_xla_refuses_in_one_line():
    pytest.importorskip("jax")
    text = "func.func @main(%a: tensor<4xf32>) -> tensor<5xf32> {\n  return %a : tensor<4xf32>\n}"
    with pytest.raises(ValueError, match=r"XLA refuses the program: .*") as error:
        compile_text(text)
    assert "\n" not in str(error.value)


def test_random_arguments_fit_the_function():
    function = parse(
        "func.func @main(%a: tensor<2x3xf32>, %b: tensor<4xi32>, %c: tensor<i1>) -> tensor<i1> {\n return %c : tensor<i1>\n}"
    )
    a, b, c = random_arguments(function)
    assert (a.shape, a.dtype, b.dtype, c.dtype) == ((2, 3), np.float32, np.int32, np.bool_)
    with pytest.raises(ValueError, match="cannot be made up"):
        random_arguments(
            parse("func.func @main(%a: tensor<2xf8E4M3FN>) -> tensor<2xf8E4M3FN> {\n return %a : tensor<2xf8E4M3FN>\n}")
        )


def test_noisy_times_are_dropped_and_counted():
    rows = [{"labels": {"noise": noise, "time": 1.0}} for noise in (0.0, 0.19, 0.21, 3.0)]
    found, noisy = values(rows, ("time", "spills"))
    assert noisy == 2
    assert np.isnan(found[2:, 0]).all()
    assert np.isnan(found[:, 1]).all()


# --- generator and corpus -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_templates_compute_what_their_shapes_say(template):
    jax = pytest.importorskip("jax")
    graph = whole(template, np.random.default_rng(4))
    outputs = jax.eval_shape(graph.function(), *graph.arguments())
    assert [one.shape for one in outputs] == [graph.shape(value) for value in graph.outputs]


def test_segments_compute_what_the_graph_does():
    jax = pytest.importorskip("jax")
    graph = whole("llama_block", np.random.default_rng(5))
    rng = np.random.default_rng(6)
    values = [rng.standard_normal(shape).astype(np.float32) * 0.1 for shape in graph.parameters]
    expected = jax.jit(graph.function())(*values)
    known = dict(enumerate(values))
    cuts = (len(graph.nodes) // 3, 2 * len(graph.nodes) // 3)
    bounds = [0, *cuts, len(graph.nodes)]
    first = len(graph.parameters)
    for segment, start, stop in zip(graph.segments(cuts), bounds, bounds[1:], strict=False):
        outer = sorted(
            {v for node in graph.nodes[start:stop] for v in node.inputs} - set(range(first + start, first + stop))
        )
        made = jax.jit(segment.function())(*[known[value] for value in outer])
        known |= dict(zip([v for v in graph.live(stop - 1) if v >= first + start], made, strict=True))
    for one, value in zip(expected, graph.outputs, strict=True):
        assert np.allclose(one, known[value], rtol=1e-4, atol=1e-5)


def test_the_stream_depends_on_seed_and_number_alone():
    def some(start):
        stream = generate(1, start)
        return [next(stream) for _ in range(6)]

    assert some(0)[4:] == some(4)[:2]
    assert some(0) != [next(generate(2, number)) for number in range(6)]
    with pytest.raises(ValueError, match="no template nothing"):
        next(generate(0, templates=["nothing"]))


def test_a_value_without_use_is_refused():
    b = Builder("mine")
    x = b.parameter(4, 4)
    b.unary("tanh", x)
    with pytest.raises(ValueError, match="without a use"):
        b.graph(b.unary("exp", x))


@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump (binutils) is not installed")
def test_a_corpus_goes_on_where_it_stopped(tmp_path):
    pytest.importorskip("jax")
    path = tmp_path / "corpus.jsonl"
    corpus.build(path, 2, together=2)
    before = path.read_text()
    with path.open("a") as file:
        file.write('{"id": "torn')
    rows = corpus.build(path, 3)
    assert path.read_text().startswith(before)
    assert [row["number"] for row in rows] == [0, 1, 2]
    assert len({row["id"] for row in rows}) == 3
    corpus.write(rows, tmp_path / "sample.jsonl.gz")
    assert corpus.read(tmp_path / "sample.jsonl.gz") == rows
    (tmp_path / "bad.jsonl").write_text(json.dumps({"id": "x"}) + "\n")
    with pytest.raises(ValueError, match="line 1: no row"):
        corpus.read(tmp_path / "bad.jsonl")


def test_linalg_of_a_program_can_be_read():
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp

    arguments = (jnp.ones((4, 8)), jnp.ones((8, 16)))
    text = capture(lambda x, w: jnp.tanh(x @ w), *arguments, dialect="linalg")
    assert {"linalg.matmul", "linalg.generic"} <= {one.name for one in parse(text).walk()}
    with pytest.raises(ValueError, match="dialect 'tosa' cannot be captured"):
        capture(jax.numpy.tanh, jnp.ones(3), dialect="tosa")
    with pytest.raises(ValueError, match="torch modules cannot be captured"):
        capture(torch.nn.Linear(3, 3), jnp.ones(3))
    with pytest.raises(ValueError, match="MLIR refuses"):
        to_linalg("func.func @main( {}")
