"""The reader of StableHLO text, the tokens made of it, and the generator of programs."""

import re
from collections import Counter

import numpy as np
import pytest

from broadsheet.methods.estimates.mlir_cost_model import order
from broadsheet.methods.estimates.mlir_cost_model.features import Features, TotalScale, count, flops, interface
from broadsheet.methods.estimates.mlir_cost_model.nodes import NodeVocabulary, nodes
from broadsheet.methods.estimates.mlir_cost_model.stablehlo import parse, tensor_type
from broadsheet.methods.estimates.mlir_cost_model.tokens import Vocabulary, detokenise, program_id, tokenise

SOFTMAX = """\
#loc1 = loc("x.py":3:4)
module @jit_f attributes {mhlo.num_partitions = 1 : i32, mhlo.num_replicas = 1 : i32} {
  func.func public @main(%arg0: tensor<8x64xf32> loc("x"), %arg1: tensor<64x16xf32>) -> (tensor<8x16xf32> {jax.result_info = "r"}) {
    %0 = stablehlo.dot_general %arg0, %arg1, contracting_dims = [1] x [0], precision = [DEFAULT, DEFAULT] : (tensor<8x64xf32>, tensor<64x16xf32>) -> tensor<8x16xf32> loc(#loc1)
    %cst = stablehlo.constant dense<0xFF800000> : tensor<f32>
    %1 = stablehlo.reduce(%0 init: %cst) applies stablehlo.maximum across dimensions = [1] : (tensor<8x16xf32>, tensor<f32>) -> tensor<8xf32>
    %2 = stablehlo.broadcast_in_dim %1, dims = [0] : (tensor<8xf32>) -> tensor<8x16xf32>
    %3 = stablehlo.subtract %0, %2 : tensor<8x16xf32>
    %4 = call @twice(%3) : (tensor<8x16xf32>) -> tensor<8x16xf32>  // a comment: %9 = nothing
    return %4 : tensor<8x16xf32>
  }
  func.func private @twice(%arg0: tensor<8x16xf32>) -> tensor<8x16xf32> {
    %0 = stablehlo.add %arg0, %arg0 : tensor<8x16xf32>
    return %0 : tensor<8x16xf32>
  }
}
"""  # noqa: E501

WHILE = """\
func.func @main(%arg0: tensor<4xf32>, %arg1: tensor<i32>) -> tensor<4xf32> {
  %c = stablehlo.constant dense<0> : tensor<i32>
  %0:2 = stablehlo.while(%iterArg = %c, %iterArg_0 = %arg0) : tensor<i32>, tensor<4xf32>
   cond {
    %1 = stablehlo.compare LT, %iterArg, %arg1, SIGNED : (tensor<i32>, tensor<i32>) -> tensor<i1>
    stablehlo.return %1 : tensor<i1>
  } do {
    %c_1 = stablehlo.constant dense<1> : tensor<i32>
    %1 = stablehlo.add %iterArg, %c_1 : tensor<i32>
    %2 = stablehlo.tanh %iterArg_0 : tensor<4xf32>
    stablehlo.return %1, %2 : tensor<i32>, tensor<4xf32>
  }
  return %0#1 : tensor<4xf32>
}
"""

GENERIC = """\
func.func @main(%arg0: tensor<4x8xf32>) -> tensor<4xf32> {
  %0 = "stablehlo.constant"() <{value = dense<0.0> : tensor<f32>}> : () -> tensor<f32>
  %1 = "stablehlo.reduce"(%arg0, %0) <{dimensions = array<i64: 1>}> ({
  ^bb0(%a: tensor<f32>, %b: tensor<f32>):
    %2 = "stablehlo.add"(%a, %b) : (tensor<f32>, tensor<f32>) -> tensor<f32>
    "stablehlo.return"(%2) : (tensor<f32>) -> ()
  }) : (tensor<4x8xf32>, tensor<f32>) -> tensor<4xf32>
  return %1 : tensor<4xf32>
}
"""

AFFINE = """\
func.func @copy(%A: memref<16x16xf32>, %B: memref<16x16xf32>) {
  affine.for %i = 0 to 16 {
    affine.for %j = 0 to 16 {
      %v = affine.load %A[%i, %j] : memref<16x16xf32>
      %w = arith.addf %v, %v : f32
      affine.store %w, %B[%j, %i] : memref<16x16xf32>
    }
  }
  return
}
"""


def renamed(text: str, rng: np.random.Generator) -> str:
    """Every value and function under another name, with other white space."""
    for name in sorted(set(re.findall(r"%[A-Za-z0-9_]+", text)), key=len, reverse=True):
        text = re.sub(rf"{name}(?![A-Za-z0-9_])", f"%n{rng.integers(10**9)}_{name[1:]}", text)
    return re.sub(r"([,:=])(?! *\d* *=)", lambda hit: hit[1] + " " * int(rng.integers(0, 3)), text).replace("\n", "\n\n")


def test_softmax_is_read_with_its_call_inlined():
    function = parse(SOFTMAX)
    assert [one.opcode for one in function.operations] == [
        "dot_general", "constant", "reduce", "broadcast_in_dim", "subtract", "add", "func.return",
    ]  # fmt: skip
    dot, *_, add, end = function.operations
    assert dot.operands == ("%arg0", "%arg1")
    assert dot.types[0].shape == (8, 16)
    assert add.operands == ("%3", "%3")
    assert end.operands == add.results
    assert function.operations[2].line == 6


def test_regions_and_several_results():
    function = parse(WHILE)
    loop = function.operations[1]
    assert loop.results == ("%0#0", "%0#1")
    assert [kind.text for kind in loop.types] == ["tensor<i32>", "tensor<4xf32>"]
    assert [[one.opcode for one in region.operations] for region in loop.regions] == [
        ["compare", "return"], ["constant", "add", "tanh", "return"],
    ]  # fmt: skip
    assert loop.operands == ("%c", "%arg0")
    assert function.operations[2].operands == ("%0#1",)


def test_regions_side_by_side_may_use_the_same_names():
    function = parse(
        WHILE.replace(
            "  return %0#1", WHILE.split("\n", 2)[2].rsplit("  return", 1)[0].replace("%0:2", "%5:2") + "  return %0#1"
        )
    )
    first, second = (one for one in function.operations if one.opcode == "while")
    assert function.types[first.regions[0].operations[0].results[0]].text == "tensor<i1>"
    values = [
        name for loop in (first, second) for region in loop.regions for one in region.operations for name in one.results
    ]
    assert len(set(values)) == len(values) == 8
    assert set(first.regions[0].arguments).isdisjoint(second.regions[0].arguments)
    assert first.regions[0].arguments == first.regions[1].arguments


def test_generic_form_and_other_dialects():
    reduce = parse(GENERIC).operations[1]
    assert reduce.opcode == "reduce"
    assert reduce.types[0].shape == (4,)
    assert [one.opcode for one in reduce.regions[0].operations] == ["add", "return"]
    loops = parse(AFFINE)
    assert [one.name for one in loops.walk()] == [
        "affine.for", "affine.for", "affine.load", "arith.addf", "affine.store", "func.return",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: no func.func"),
        ("func.func @f(%a: tensor<?x4xf32>) {\n return\n}", "line 1: dynamic shape tensor<\\?x4xf32>"),
        ("func.func @f(%a: tensor<4xf32>) {\n %0 = tosa.add %a, %a : tensor<4xf32>\n return\n}", "line 2: dialect 'tosa'"),
        ("func.func @f(%a: tensor<4xf32>) {\n\n %0 = stablehlo.add %a, %b : tensor<4xf32>\n return\n}", "line 3: %b is"),
        ("func.func @f(%a: tensor<4xf32>) {\n %0 = stablehlo.tanh %a : tensor<4xf32>\n", "line 2: stablehlo.tanh is not"),
        ("func.func @f(%a: tensor<4xf32) {\n return\n}", "line 1: .* is never closed"),
        ("func.func @f(%a: tensor<4xf32>) {\n 7 + 4\n}", "line 2: an operation was expected, not '7'"),
        ("func.func @f(%a: tensor<4xf32>) {\n %0 = call @g(%a) : (tensor<4xf32>) -> tensor<4xf32>\n}", "line 2: the call"),
        ("func.func @f() {\n return\n}\nfunc.func @g() {\n return\n}", "line 1: 2 public functions"),
        ("func.func @f() {\n `\n}", "line 2: cannot read"),
    ],
)  # fmt: skip
def test_errors_name_the_line(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_recursion_is_refused():
    call = "%0 = call @main(%a) : (tensor<f32>) -> tensor<f32>"
    text = f"func.func @main(%a: tensor<f32>) -> tensor<f32> {{\n {call}\n return %0 : tensor<f32>\n}}"
    with pytest.raises(ValueError, match="calls itself"):
        parse(text)


def test_types():
    assert tensor_type("tensor<8x64xf32>").nbytes == 8 * 64 * 4
    assert tensor_type("tensor<3xcomplex<f64>>").nbytes == 48
    assert tensor_type("tensor<5xi1>").nbytes == 5
    assert tensor_type("tensor<bf16>").nbytes == 2
    assert tensor_type("tensor<8x4xf32, #sparse>").shape == (8, 4)
    assert tensor_type("!stablehlo.token").nbytes == 0


@pytest.mark.parametrize("text", [SOFTMAX, WHILE, GENERIC])
def test_names_and_white_space_leave_no_trace(text):
    rng = np.random.default_rng(0)
    for scheme in ("ops", "operands"):
        assert tokenise(parse(renamed(text, rng)), scheme).words == tokenise(parse(text), scheme).words
    assert program_id(parse(renamed(text, rng))) == program_id(parse(text))


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_programs_keep_their_tokens_and_distinct_ones_differ(count):
    rng = np.random.default_rng(1)
    texts = [order.program(rng) for _ in range(count)]
    names = set()
    for text in texts:
        function = parse(text)
        tokens = tokenise(function)
        assert tokenise(parse(renamed(text, rng))).words == tokens.words
        # What was dropped are names alone: the tokens rebuild every operation with its operands by position.
        assert [line.split() for line in detokenise(tokens.words)] == [["begin"], list(tokens.words[1:-1]), ["end"]]
        names.add(program_id(function))
    assert len(names) == len({" ".join(tokenise(parse(text)).words) for text in texts})


def test_operands_show_in_one_scheme_alone():
    one = parse(SOFTMAX)
    other = parse(SOFTMAX.replace("stablehlo.subtract %0, %2", "stablehlo.subtract %2, %0"))
    assert tokenise(one, "ops").words == tokenise(other, "ops").words
    assert tokenise(one, "operands").words != tokenise(other, "operands").words
    with pytest.raises(ValueError, match="scheme is ops or operands"):
        tokenise(one, "both")


def test_attributes_that_cost_are_kept():
    words = tokenise(parse(SOFTMAX)).words
    assert {"contracting_dims[1]", "maximum", "dimensions[1]", "dims[0]"} <= set(words)
    assert not {"DEFAULT", "precision"} & set(words)


def test_vocabulary_is_of_the_training_programs():
    rng = np.random.default_rng(2)
    programs = [parse(order.program(rng)) for _ in range(40)]
    vocabulary = Vocabulary.build([tokenise(program) for program in programs])
    code = vocabulary.encode(tokenise(programs[0]))
    seen = Counter(word for program in programs for word in set(tokenise(program).words))
    assert code.unknown == sum(seen[word] < 8 for word in tokenise(programs[0]).words) / len(code.numbers)
    assert code.cut == 0
    strange = parse(SOFTMAX)
    code = vocabulary.encode(tokenise(strange))
    assert 0 < code.unknown < 1
    short = Vocabulary(vocabulary.words, 10)
    assert short.encode(tokenise(strange)).cut == len(code.numbers) - 10
    # A shape that is in one group alone is no word: it would be that group's name.
    lone = Vocabulary.build([tokenise(program) for program in programs], groups=[0] * len(programs))
    assert not any(word.startswith("tensor") for word in lone.words)


def test_flops_and_bytes():
    function = parse(SOFTMAX)
    dot, reduce, subtract, add = 2 * 8 * 16 * 64, 8 * 16, 8 * 16, 8 * 16
    assert flops(function) == dot + reduce + subtract + add
    assert interface(function) == 4 * (8 * 64 + 64 * 16 + 8 * 16)
    matrix, row = 4 * 8 * 16, 4 * 8
    traffic = 4 * (8 * 64 + 64 * 16) + matrix + (matrix + 4 + row) + (row + matrix) + 3 * matrix + 3 * matrix
    counts = count(function)
    assert counts.totals == (dot, 0, reduce, subtract + add, traffic, interface(function), 4 * 64 * 16, 7)
    assert counts.flops == (dot, 0, reduce, 0, subtract, add, 0)
    assert counts.number["subtract"] == 1
    assert counts.size["dot_general"] == matrix


def test_features_have_a_column_for_every_opcode():
    features = Features.build([count(parse(SOFTMAX))])
    rows = features([count(parse(SOFTMAX)), count(parse(WHILE))])
    assert rows.shape[0] == 2
    assert rows[0, features.opcodes.index("add")] == 1


def test_the_weighted_sum_finds_additive_costs():
    rng = np.random.default_rng(3)
    raw = rng.uniform(1e4, 1e7, (200, 8))
    first, second = np.array([2e-5, 0, 3e-4, 0, 0, 0, 0, 0]), np.array([0, 1.0, 0, 0, 2.0, 0, 0, 0])
    scale = TotalScale.fit(raw, np.stack([raw @ first + 7, raw @ second], 1))
    assert np.allclose(np.array(scale.weights)[0, [0, 2]], [2e-5, 3e-4], rtol=0.01)
    assert np.allclose(scale.sums(raw)[:, 1], np.log2(raw @ second), atol=0.01)
    assert scale(raw).shape == (200, scale.width)


# --- graphs -------------------------------------------------------------------------------------------------------------


def test_a_graph_has_an_edge_for_every_operand():
    found = nodes(count(parse(SOFTMAX)))
    names = [words[0] for words in found.words]
    assert names == [
        "argument", "argument", "dot_general", "constant", "reduce", "broadcast_in_dim", "subtract", "add", "func.return",
    ]  # fmt: skip
    assert found.edges == [(2, 0), (2, 1), (4, 2), (4, 3), (5, 4), (6, 2), (6, 5), (7, 6), (7, 6), (8, 7)]
    assert found.last == [8, 8, 6, 4, 5, 6, 7, 8, 8]
    assert [row[-1] for row in found.sizes] == [1, 1, 2, 1, 1, 1, 2, 1, 0]
    assert found.sizes[2][:6] == (2 * 8 * 16 * 64, 4 * 8 * 16, 4 * (8 * 64 + 64 * 16), 16, 8, 64)
    assert "contracting_dims[1]" in found.words[2]


def test_what_stands_in_a_region_says_so():
    found = nodes(count(parse(WHILE)))
    assert [words[0] for words in found.words if "in while" in words].count("compare") == 1
    assert all(reader > read for reader, read in found.edges)


@pytest.mark.parametrize("text", [SOFTMAX, WHILE, GENERIC])
def test_graphs_know_no_names(text):
    rng = np.random.default_rng(0)
    assert nodes(count(parse(renamed(text, rng)))) == nodes(count(parse(text)))


def test_words_of_graphs_and_what_is_cut():
    programs = [count(parse(order.program(np.random.default_rng(seed)))) for seed in range(40)]
    vocabulary = NodeVocabulary.build(programs)
    code = vocabulary.encode(programs[0], np.ones(3))
    assert code.words.shape[0] == code.length == len(programs[0].operations) + 1
    assert code.unknown < 0.1
    assert code.cut == 0
    assert vocabulary.encode(count(parse(WHILE)), np.ones(3)).unknown > 0.2
    short = NodeVocabulary(vocabulary.words, 5).encode(programs[0], np.ones(3))
    assert (short.length, short.cut) == (5, code.length - 5)
    assert short.edges.max() < 5
    assert short.last.max() == 4
