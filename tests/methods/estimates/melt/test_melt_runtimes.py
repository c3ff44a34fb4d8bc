"""GGUF files and llama.cpp, fixed lengths, accuracy, a competing task, the commands."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from command import broadsheet

from broadsheet.methods.estimates.melt import accuracy as acc
from broadsheet.methods.estimates.melt.clock import Clock
from broadsheet.methods.estimates.melt.config import ModelConfig, RunSettings, Sampling
from broadsheet.methods.estimates.melt.device import device, sustain, sustained_table
from broadsheet.methods.estimates.melt.fixed import Fixed, rows, run_fixed
from broadsheet.methods.estimates.melt.gguf_file import _interleaved, write_gguf
from broadsheet.methods.estimates.melt.profile import profile
from broadsheet.methods.estimates.melt.qoe import Latency, experience, job_latency
from broadsheet.methods.estimates.melt.runtimes import StepRuntime, TorchRuntime

GREEDY = ModelConfig("pocket-2m", sampling=Sampling(temperature=0))
SETTINGS = RunSettings(context=512, max_gen=12, max_busy=1.0)


def torch_runtime(form="fp32", **settings):
    made = TorchRuntime("pocket-2m", form, GREEDY, RunSettings(**{**vars(SETTINGS), **settings}), Clock())
    made.load()
    return made


@pytest.fixture(scope="module")
def plain():
    return torch_runtime()


# --- GGUF -------------------------------------------------------------------------------------------------------------


def test_rows_of_heads_from_halves_to_pairs():
    values = np.arange(8, dtype=np.float32)[:, None].repeat(2, 1)  # two heads of four rows
    assert _interleaved(values, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_file_says_what_the_model_is(tmp_path, plain):
    gguf = pytest.importorskip("gguf", reason="the gguf package is an extra")
    path = write_gguf(plain.network, plain.tokenizer, tmp_path / "pocket.gguf", "q4_0")
    reader = gguf.GGUFReader(path)
    fields = {
        name: field.contents() for name, field in reader.fields.items() if name.startswith(("llama.", "tokenizer.ggml.bos"))
    }
    assert fields["llama.block_count"] == 4
    assert fields["llama.attention.key_length"] == 64
    assert fields["llama.rope.freq_base"] == 20000.0
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == "Q4_0"
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    assert "output.weight" not in tensors  # it is the embedding
    weight = plain.network.model.layers[0].mlp.up_proj.weight
    back = gguf.quants.dequantize(tensors["blk.0.ffn_up.weight"].data, tensors["blk.0.ffn_up.weight"].tensor_type)
    assert np.abs(back - weight.detach().numpy()).max() < weight.abs().max() / 7


def test_models_and_formats_that_are_not_covered(tmp_path, plain):
    pytest.importorskip("gguf", reason="the gguf package is an extra")
    with pytest.raises(ValueError, match="unknown quantisation 'q9_9'"):
        write_gguf(plain.network, plain.tokenizer, tmp_path / "x.gguf", "q9_9")
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16))
    with pytest.raises(ValueError, match=r"gpt2 model is not covered; use llama\.cpp's convert_hf_to_gguf\.py"):
        write_gguf(other, plain.tokenizer, tmp_path / "x.gguf", "f16")
    assert not list(tmp_path.iterdir())


def llama_runtime(form, **settings):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra")
    pytest.importorskip("gguf", reason="the gguf package is an extra")
    from broadsheet.methods.estimates.melt.llamacpp import LlamaCppRuntime

    made = LlamaCppRuntime("pocket-2m", form, GREEDY, RunSettings(**{**vars(SETTINGS), **settings}), Clock())
    made.load()
    return made


def test_llama_cpp_gives_the_logits_of_transformers(plain):
    llama = llama_runtime("f32")
    ids = plain.dialogue.opening("Pay bedu 75. Pay fezo 33. How much do you pay bedu?")
    assert ids == llama.dialogue.opening("Pay bedu 75. Pay fezo 33. How much do you pay bedu?")
    plain.begin(0)
    llama.begin(0)
    wanted, got = plain.run(ids), torch.as_tensor(llama.run(ids))
    assert (wanted - got).abs().max() < 2e-3 * wanted.abs().max()  # llama.cpp keeps its cache in 16 bits
    # rewinding forgets what came behind
    first = torch.as_tensor(llama.run([7]))
    llama.rewind(len(ids))
    llama.run([9])
    llama.rewind(len(ids))
    assert torch.allclose(first, torch.as_tensor(llama.run([7])), atol=1e-5)
    llama.begin(0)
    plain.begin(0)
    for prompt in ("Pay bedu 75. Pay fezo 33. How much do you pay bedu?", "How much do you pay fezo?"):
        one, other = plain.answer(prompt), llama.answer(prompt)
        assert (one.text, one.input_tokens, one.session_tokens) == (other.text, other.input_tokens, other.session_tokens)
    llama.unload()


def test_fewer_bits_make_smaller_files():
    full, small = llama_runtime("f16"), llama_runtime("q4_0")
    assert small.nbytes < 0.5 * full.nbytes
    assert small.pass_bytes < small.nbytes
    full.unload()
    small.unload()


def test_a_file_that_is_not_there():
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra")
    from broadsheet.methods.estimates.melt.llamacpp import LlamaCppRuntime

    with pytest.raises(ValueError, match=r"no GGUF file at nowhere\.gguf"):
        LlamaCppRuntime("nowhere.gguf", "file", GREEDY, SETTINGS, Clock())


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, plain):
    """A folder with a model of random weights, whose output layer is not its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    plain.tokenizer.save_pretrained(folder)
    return str(folder)


def onnx_runtime(model, form):
    from broadsheet.methods.estimates.melt.onnx_runtime import OnnxRuntime

    made = OnnxRuntime(model, form, GREEDY, RunSettings(context=128, max_gen=12), Clock())
    made.load()
    return made


@pytest.mark.slow
def test_onnx_runtime_writes_what_transformers_writes(tiny, tmp_path, monkeypatch):
    for package in ("onnxruntime", "onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is an extra")
    monkeypatch.setenv("BROADSHEET_HOME", str(tmp_path))
    reference = TorchRuntime(tiny, "fp32", GREEDY, RunSettings(context=128, max_gen=12), Clock())
    reference.load()
    sizes = []
    for form, off in (("fp32", 1e-4), ("int8", 0.05), ("int4", 0.5)):
        runtime = onnx_runtime(tiny, form)
        reference.begin(0)
        runtime.begin(0)
        ids = [5, 9, 400, 77]
        for some in (ids, [3], [8, 8]):  # a prompt, a token, and a longer piece behind what is cached
            wanted, got = reference.run(some), torch.from_numpy(runtime.run(some))
            assert (wanted - got).norm() <= off * wanted.norm()
        runtime.rewind(len(ids))
        reference.rewind(len(ids))
        assert (reference.run([7]) - torch.from_numpy(runtime.run([7]))).norm() <= off * wanted.norm()
        sizes.append((runtime.nbytes, runtime.pass_bytes))
        assert runtime.nbytes - runtime.pass_bytes == 2048 * 128 * 4  # the embedding is looked up
        assert sum(path.stat().st_size for path in runtime.files()) >= runtime.nbytes
        if form == "fp32":
            assert runtime.nbytes == pytest.approx(reference.nbytes, rel=1e-3)
            reference.begin(0)
            runtime.begin(0)
            for prompt in ("Pay bedu 75.", "How much?"):
                one, other = reference.answer(prompt), runtime.answer(prompt)
                assert reference.tokens == runtime.tokens
                assert (one.input_tokens, one.session_tokens) == (other.input_tokens, other.session_tokens)
        runtime.unload()
    weights = [held for _, held in sizes]
    assert weights[1] < 0.3 * weights[0]  # a quarter, and scales
    assert weights[2] < 0.17 * weights[0]
    runtime.settings = RunSettings(context=512)
    with pytest.raises(ValueError, match="a context of 512 is beyond the 256 positions"):
        runtime.load()


def test_onnx_runtime_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"pip install 'broadsheet\[onnx\]'"):
        onnx_runtime("pocket-2m", "fp32")
    with pytest.raises(ValueError, match="onnxruntime has no format 'bf16'; it has fp32, int8, int4"):
        onnx_runtime("pocket-2m", "bf16")


# --- fixed lengths ----------------------------------------------------------------------------------------------------


def test_fixed_lengths_are_llama_benchs(plain):
    tests = [run_fixed(plain, n_prompt=32, repetitions=3), run_fixed(plain, n_gen=8, n_depth=16, repetitions=3)]
    assert [test.name for test in tests] == ["pp32", "tg8 @ d16"]
    assert plain.cache.get_seq_length() == 24
    for test, row in zip(tests, rows(plain, tests), strict=True):
        assert row["n_prompt"] + row["n_gen"] == test.tokens
        assert row["avg_ts"] == pytest.approx(np.mean([test.tokens / s for s in test.wall]))
        assert len(row["samples_ns"]) == 3
        json.dumps(row)
    assert Fixed(4, 2, 0, (1.0, 3.0), (0.5, 0.5)).median() == 4.0
    with pytest.raises(ValueError, match="600 tokens do not fit a context of 512"):
        run_fixed(plain, n_prompt=600)
    with pytest.raises(ValueError, match="at least one token"):
        run_fixed(plain)


def test_profile_adds_up_to_the_passes(plain):
    log = profile(plain, tokens=4, held=8)
    assert (log.backend, log.evaluations) == ("torch", 4)
    shares = {share.name: share for share in log.merged("per_op")}
    assert shares["MUL_MAT"].count == 4 * (4 * 7 + 1)  # seven layers a block, and the output layer
    assert shares["rest"].count == 4
    assert sum(share.share for share in shares.values()) == pytest.approx(1)
    assert {share.name for share in log.merged("per_module")} >= {"attention", "mlp", "output", "embedding", "norms"}
    packed = {share.name: share for share in profile(torch_runtime("int8"), tokens=2, held=8).merged("per_op")}
    assert packed["MUL_MAT"].count == 2 * (4 * 7 + 1)
    assert not plain.network.model.layers[0].mlp.up_proj._forward_hooks  # they are gone
    with pytest.raises(ValueError, match="do not fit a context of 512"):
        profile(plain, tokens=600)


def test_bfloat16_tokens_are_multiplied_without_onednn():
    runtime, seen = torch_runtime("bf16"), []
    runtime.network.lm_head.register_forward_hook(lambda *_: seen.append(torch.backends.mkldnn.enabled))
    runtime.begin(0)
    runtime.run([5, 9])
    runtime.run([7])
    assert seen == [True, False]
    assert torch.backends.mkldnn.enabled


# --- accuracy ---------------------------------------------------------------------------------------------------------


def test_the_right_choice_is_found(plain):
    items = acc.microworld_items("kv", 12, context=96, choices=4)
    assert items == acc.microworld_items("kv", 12, context=96, choices=4)
    assert {item.gold for item in items} == {0, 1, 2, 3}
    found = acc.measure_accuracy(plain, "kv", items)
    assert found.value >= 11 / 12
    wrong = [acc.Item(item.query, item.choices, (item.gold + 1) % len(item.choices)) for item in items]
    assert acc.measure_accuracy(plain, "kv", wrong).value <= 1 / 12


def test_replies_in_one_batch_are_as_likely_as_one_by_one(plain):
    prompt = plain.dialogue.opening("Pay bedu 75. Pay fezo 33. How much do you pay bedu?")
    replies = [plain.dialogue.tokenize(text) for text in (" Pay bedu 75.", " Pay bedu 33.", " Pay", " I do not know.")]
    assert len({len(reply) for reply in replies}) > 1
    one_by_one = StepRuntime.log_likelihoods(plain, prompt, replies)
    assert plain.log_likelihoods(prompt, replies) == pytest.approx(one_by_one, abs=1e-3)
    assert plain.log_likelihoods(prompt, [[reply[0]] for reply in replies])[2] == pytest.approx(one_by_one[2], abs=1e-3)
    assert one_by_one[0] > one_by_one[1]


def test_written_answers_are_checked(plain):
    long = torch_runtime(max_gen=32)
    assert acc.measure_written(long, "arithmetic", 6).value >= 0.5
    assert acc.measure_written(torch_runtime(max_gen=2), "arithmetic", 6).value == 0  # cut off before the result
    with pytest.raises(ValueError, match="no task 'poems'"):
        acc.measure_written(plain, "poems")


def test_small_differences_are_no_difference():
    base = acc.Accuracy("t", "fp32", (True,) * 80 + (False,) * 20)
    near = acc.Accuracy("t", "int4", (True,) * 78 + (False,) * 22)
    far = acc.Accuracy("t", "int2", (True,) * 50 + (False,) * 50)
    assert base.error == pytest.approx(math.sqrt(0.8 * 0.2 / 99))
    assert acc.difference(near, base)[2] == "no difference"
    assert acc.difference(far, base)[2] == "worse"
    assert acc.difference(base, far)[2] == "better"
    table = acc.accuracy_table({"t": [base, near, far]}).records()
    assert table[0]["accuracy"] == "0.800 ± 0.040"
    assert table[0]["n"] == 100
    assert [row["verdict"] for row in table] == ["", "no difference", "worse"]
    with pytest.raises(ValueError, match="int4 has 100 items of t, x 1 of t"):
        acc.difference(near, acc.Accuracy("t", "x", (True,)))


def test_items_of_lm_eval(tmp_path):
    path = tmp_path / "arc.jsonl"
    path.write_text('{"query": "2 + 2?", "choices": ["4", "5"], "gold": 0}\n\n')
    assert acc.read_items(path) == [acc.Item("2 + 2?", ("4", "5"), 0)]
    for text, message in (
        ('{"query": "a"}', "line 1: not an item"),
        ("", "holds no items"),
        ('{"query": "", "choices": ["a", "a"], "gold": 0}', "two different"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            acc.read_items(path)


# --- a competing task -------------------------------------------------------------------------------------------------


def test_latency_of_a_periodic_job():
    calls = []
    latency = job_latency(lambda: calls.append(0), period=0.01, count=5, work=1000)
    assert len(latency.values) == 5
    assert calls
    assert all(value >= 0 for value in latency.values)
    assert latency.p95 >= latency.median
    with pytest.raises(ValueError, match="above 0"):
        job_latency(period=0)


def test_experience():
    from test_melt_metrics import turn

    turns = [turn(decode=1.0), turn(decode=4.0), turn(tokens=0, decode=0.0)]  # 10 and 2.5 tokens a second
    found = experience(turns, Latency((0.1, 0.1)), Latency((0.3, 0.3)))
    assert found.reads_along == 0.5
    assert found.slowdown == pytest.approx(3)
    with pytest.raises(ValueError, match="no turn has an output token"):
        experience([turns[2]])


# --- commands ---------------------------------------------------------------------------------------------------------


def test_commands(tmp_path):
    out = tmp_path / "runs"
    quick = ("--count", "1", "--repetitions", "1", "--max-gen", "4", "--set", "max_busy=1", "--set", "warmup=0")
    shown = broadsheet("melt", "run", *quick, "--out", str(out))
    assert "pocket-2m fp32 torch" in shown.stdout
    broadsheet("melt", "report", str(out), "--out", str(tmp_path / "report.md"))
    assert "## By turn of the conversation" in (tmp_path / "report.md").read_text()
    broadsheet("melt", "report", str(out), "--out", str(tmp_path / "bench.json"))
    assert {row["n_threads"] for row in json.loads((tmp_path / "bench.json").read_text())} == {1}
    bad = broadsheet("melt", "run", "--formats", "q9", *quick, check=False)
    assert bad.returncode == 2
    assert (
        bad.stderr.strip()
        .splitlines()[-1]
        .endswith("torch has no format 'q9'; it has fp32, fp16, bf16, int8, int4, int3, int2")
    )
    assert broadsheet("melt", "parse-ops", str(tmp_path / "no.log"), check=False).returncode == 2


def test_commands_for_accuracy_and_devices(tmp_path):
    path = tmp_path / "recall.jsonl"
    asked = "How much do you pay bedu?"
    items = [{"query": f"Pay bedu {n}. {asked}", "choices": [f"Pay bedu {n}.", "Pay bedu 11."], "gold": 0} for n in (42, 87)]
    path.write_text("\n".join(map(json.dumps, items)))
    out = tmp_path / "accuracy.md"
    broadsheet("melt", "accuracy", "--formats", "fp32,int4", "--items", str(path), "--out", str(out))
    assert "| recall | fp32 | 2 | 1.000 ± 0.000 | reference |" in out.read_text()
    assert "no difference" in out.read_text()
    shown = broadsheet("melt", "device", "pixel-6a", "--formats", "q4_0", "--seconds", "60").stdout
    assert "tokens/s simulated" in " ".join(shown.split())
    assert broadsheet("melt", "device", "nokia", check=False).returncode == 2
    # no number of the simulated table lacks its tag
    table = sustained_table([("q4_0", sustain(device("pixel-6a"), "llama-2-7b", "q4_0", seconds=60))])
    for row in table.rows:
        assert all(cell is None or cell.endswith("simulated") for cell in row[2:])
