"""DFloat11: its acceptance checks, and parity with what the authors' encoder wrote."""

import contextlib
import hashlib
import json
import shutil
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from broadsheet.core.models import load
from broadsheet.methods.weights.base import Unreachable, size
from broadsheet.methods.weights.dfloat11 import (
    Damaged,
    DFloat11,
    DFloat11Model,
    compress_model,
    compressed,
    decode,
    decode_lanes,
    decode_scalar,
    encode,
    infer_patterns,
    inspect,
    runtime,
    unit_of,
    verify,
)
from broadsheet.methods.weights.dfloat11.codec import (
    BLOCK_THREADS,
    THREAD_BITS,
    Unit,
    exponent_counts,
    merge,
    pack_gaps,
    split,
    unpack_gaps,
)
from broadsheet.methods.weights.dfloat11.huffman import EXPONENTS, TABLES, Code, canonical, code_of, huffman, limited_lengths
from broadsheet.methods.weights.quantiser import save

GOLDEN = Path(__file__).parents[2] / "golden/dfloat11_official.safetensors"
DECODERS = {"scalar": decode_scalar, "lanes": decode_lanes, "kernel": decode}
STORABLE = 2.0**100


def gaussian(count: int, seed: int = 0, deviation: float = 0.02) -> torch.Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * deviation).bfloat16()


def of_exponents(exponents: np.ndarray) -> torch.Tensor:
    """Weights with these exponents and all kinds of signs and mantissas."""
    rest = (np.arange(exponents.size) * 37 % 256).astype(np.uint8)
    return torch.from_numpy(merge(exponents.astype(np.uint8), rest).view(np.int16)).view(torch.bfloat16)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit: -0 is not 0."""
    return torch.equal(a.flatten().view(torch.int16), b.flatten().view(torch.int16))


def starts_of(unit: Unit) -> np.ndarray:
    """The bit at which each weight's code starts, by brute force."""
    lengths = unit.luts[-1].numpy()[split(decode_scalar(unit))[0]].astype(np.int64)
    return np.cumsum(lengths) - lengths


def fibonacci(count: int) -> np.ndarray:
    """Counts whose code is as long as can be: one bit more for every exponent."""
    numbers = [1, 1]
    while len(numbers) < count:
        numbers.append(numbers[-1] + numbers[-2])
    counts = np.zeros(256, np.int64)
    counts[100 : 100 + count] = numbers
    return counts


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    """What LeanModels/DFloat11 wrote; tests/golden/README.md says how it was made."""
    return load_file(GOLDEN)


def golden_unit(golden: dict[str, torch.Tensor], case: str) -> Unit:
    return Unit(**{name.removeprefix(case + "."): value for name, value in golden.items() if name.startswith(case + ".")})


@pytest.fixture
def folder(tmp_path) -> Path:
    """A bfloat16 model on disk."""
    tiny("gqa").save_pretrained(tmp_path / "original")
    AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.bfloat16).save_pretrained(tmp_path / "original")
    return tmp_path / "original"


def loaded(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


# --- acceptance -----------------------------------------------------------------------------------------


def test_acceptance_1_every_pattern_survives_and_what_cannot_be_stored_is_refused():
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)
    exponents, rest = split(patterns)
    assert np.array_equal(merge(exponents, rest), patterns.view(torch.int16).numpy().view(np.uint16))
    stored = patterns[torch.from_numpy(exponents < EXPONENTS)]
    assert same(decode(encode([stored])), stored)
    for bad in (float("inf"), -float("inf"), float("nan"), 2.0**113):
        with pytest.raises(ValueError, match=r"infinity, NaN or magnitude of 2\^113"):
            encode([torch.tensor([1.0, bad]).bfloat16()])


@pytest.mark.parametrize(
    "weights",
    [
        gaussian(30_000),
        torch.zeros(5_000, dtype=torch.bfloat16),
        torch.tensor([-0.0, 0.0]).bfloat16(),
        torch.tensor([3.0]).bfloat16(),
        gaussian(511),
        gaussian(512),
        gaussian(513),
        of_exponents(np.full(70_000, 120)),
        of_exponents(np.arange(EXPONENTS).repeat(30)),
        of_exponents(np.concatenate([np.full(100_000, 110), np.arange(EXPONENTS)])),
    ],
    ids="gaussian zeros signed-zeros one 511 512 513 one-exponent all-exponents one-of-each".split(),
)
def test_acceptance_2_round_trips_are_exact(weights):
    unit = encode([weights])
    assert all(same(decoder(unit), weights) for decoder in DECODERS.values())
    again = encode([decode(unit)])
    assert all(torch.equal(a, b) for a, b in zip(unit.tensors().values(), again.tensors().values()))


def test_acceptance_2_codes_of_32_bits():
    code = code_of(fibonacci(34))
    assert code.longest == 32
    few = of_exponents(np.random.default_rng(0).permutation(np.repeat(np.arange(100, 134), 40)))
    unit = encode([few], code)
    assert unit.luts[-1].max() == 32
    assert all(same(decoder(unit), few) for decoder in DECODERS.values())
    many = of_exponents(np.repeat(np.arange(256), fibonacci(33)))  # 9 million weights whose own code is that long
    unit = encode([many])
    assert unit.luts[-1].max() == 32
    assert same(decode(unit), many)


@given(st.data())
@settings(max_examples=10, deadline=None)
def test_acceptance_2_random_weights(data):
    seed, kinds = data.draw(st.integers(0, 1 << 30)), data.draw(st.integers(1, EXPONENTS))
    draw = np.random.default_rng(seed)
    share = draw.dirichlet(np.full(kinds, data.draw(st.sampled_from([0.02, 0.2, 2.0]))))
    weights = of_exponents(
        draw.permutation(EXPONENTS)[:kinds][draw.choice(kinds, data.draw(st.integers(1, 20_000)), p=share)]
    )
    parts = weights.split(data.draw(st.integers(1, weights.numel())))
    unit = encode(parts)
    assert len(unit.split_positions) == len(parts) - 1
    assert all(same(decoder(unit), weights) for decoder in DECODERS.values())


@pytest.mark.parametrize("seed", [0, 1])
def test_acceptance_3_gaussian_weights_take_10_79_bits(seed):
    unit = encode([gaussian(4_000_000, seed)])
    assert unit.bits_per_weight == pytest.approx(10.79, abs=0.02)
    share = exponent_counts([gaussian(4_000_000, seed)]) / 4e6
    share = share[share > 0]
    assert unit.bits_per_weight > 8 - (share * np.log2(share)).sum()


def test_acceptance_4_decoders_agree_and_lanes_are_20_times_faster_than_one():
    weights = gaussian(1_000_000)
    unit, seconds = encode([weights]), {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other burn CPU time on a busy machine
    try:
        for name in ("kernel", "lanes", "lanes", "lanes", "scalar"):
            start = time.thread_time()
            assert same(DECODERS[name](unit), weights)
            seconds[name] = time.thread_time() - start  # the last of the lanes' runs: the first one makes their buffers
    finally:
        torch.set_num_threads(threads)
    assert seconds["scalar"] / seconds["lanes"] >= 20


def test_acceptance_5_gaps_counts_and_positions_are_those_of_a_brute_force_scan():
    weights = torch.cat([gaussian(30_000), of_exponents(np.full(40_000, 120)), gaussian(17)])
    unit = encode([weights])
    starts, gaps = starts_of(unit), unpack_gaps(unit.gaps.numpy())
    counts = np.bincount(starts // THREAD_BITS, minlength=gaps.size)
    assert gaps.size == unit.blocks * BLOCK_THREADS
    assert counts.sum() == unit.weights
    assert gaps.max() <= 31
    threads = np.flatnonzero(counts)
    first = np.searchsorted(starts, threads * THREAD_BITS)
    assert np.array_equal(gaps[threads], starts[first] - threads * THREAD_BITS)
    positions = unit.positions()
    assert (np.diff(positions.astype(np.int64)) >= 0).all()
    assert np.array_equal(
        positions, [*np.searchsorted(starts, np.arange(unit.blocks) * BLOCK_THREADS * THREAD_BITS), 70_017]
    )


def test_acceptance_6_the_pocket_model_is_the_same_model_in_less_memory():
    model, _ = load("pocket-2m", dtype=torch.bfloat16)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # an output layer of its own
    model.all_tied_weights_keys, model.config.tie_word_embeddings = {}, False
    ids, before = random_ids(1, 1000, vocabulary=2000), size(model).bytes
    with torch.inference_mode():
        wanted = model(ids).logits
        DFloat11().compress(model)
        assert size(model).bytes <= 0.72 * before
        assert same(model(ids).logits, wanted)
    workspace = next(compressed(model))[2].workspace
    assert workspace is model.dfloat11_workspace
    assert workspace.nbytes == 2 * max(unit_of(model, name).weights for name, _, _ in compressed(model))
    assert size(model).bytes <= 0.72 * before + workspace.nbytes  # which counts the buffer too
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _reachable_tensors(model)}
    assert sum(held.values()) == size(model).bytes


def _reachable_tensors(model: nn.Module) -> list[torch.Tensor]:
    """All tensors that hang on a model: parameters, buffers, plain attributes, the shared buffer."""
    found = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        found += [value for value in module.__dict__.values() if isinstance(value, torch.Tensor)]
    for _, _, decompressor in compressed(model):
        found += [*decompressor.workspace.buffers(), *decompressor.host.values()]
    return found


@pytest.mark.parametrize(
    "counts", [fibonacci(34), exponent_counts([gaussian(100_000)]), np.r_[np.full(240, 7), np.zeros(16, int)]]
)
def test_acceptance_7_tables_are_few_and_short_codes_are_in_the_first(counts):
    code = code_of(counts)
    luts = code.luts()
    assert len(luts) - 1 == len(code.prefixes()) <= TABLES
    for symbol in np.flatnonzero(code.lengths[:256]):
        length, value = int(code.lengths[symbol]), int(code.values[symbol])
        for behind in (0, (1 << (32 - length)) - 1):  # whatever follows
            window, table, touched = value << (32 - length) | behind, 0, 0
            while True:
                entry = int(luts[table, window >> (24 - 8 * touched) & 255])
                touched += 1
                if entry < EXPONENTS:
                    break
                table = 256 - entry
            assert entry == symbol
            assert touched == -(-length // 8)


def test_acceptance_8_flipped_bytes_do_no_harm():
    weights = gaussian(40_000)
    unit = encode([weights[:30_000], weights[30_000:]])
    guarded = torch.full((weights.numel() + 8192,), -7.0, dtype=torch.bfloat16)
    out, draw = guarded[4096:-4096], np.random.default_rng(0)
    raised = changed = 0
    for flip in range(1000):
        tensors = {name: tensor.clone() for name, tensor in unit.tensors().items()}
        name = draw.choice(["luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps"])
        place = int(draw.integers(tensors[name].numel()))
        tensors[name].view(-1)[place] ^= int(draw.integers(1, 256))
        damaged = Unit(**tensors)
        decoder = decode if flip % 20 else decode_lanes
        try:
            differs = not same(decoder(damaged, out), weights)
        except Damaged:
            raised += 1
        else:
            changed += differs
            # Some bytes decide nothing: entries between codes, lengths of absent exponents, gaps inside a block.
            assert differs or name in ("luts", "gaps"), name
        assert (guarded[:4096] == -7).all()
        assert (guarded[-4096:] == -7).all()
    assert raised > 200
    assert changed > 150


def test_acceptance_9_no_gain_is_said_not_made_up(folder):
    halves = folder.with_name("halves")
    loaded(folder).half().save_pretrained(halves)
    report = inspect(halves)
    assert str(report).startswith("no gain: float16")
    assert not report.units
    with pytest.raises(ValueError, match=r"model\.embed_tokens: float16 has 5 exponent bits"):
        DFloat11().compress(loaded(folder).half())
    with pytest.raises(ValueError, match=r"only bfloat16 is stored without loss, not float32"):
        DFloat11().compress(loaded(folder).float())


# --- the authors' encoder -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["small", "blocks", "wide", "two", "boundary"])
def test_official_units_decode_and_ours_are_the_same_bytes(golden, case):
    unit = golden_unit(golden, case)
    decoded = [decoder(unit) for decoder in DECODERS.values()]
    with safe_open(GOLDEN, "pt") as file:
        digest = file.metadata()[f"{case}.sha256"]
    for weights in decoded:
        assert hashlib.sha256(weights.view(torch.int16).numpy().tobytes()).hexdigest() == digest
    ours = encode(decoded[0].split(unit.sizes()))
    for name, tensor in unit.tensors().items():
        if (case, name) == ("boundary", "output_positions"):
            # No code starts in the last block, and the official encoder writes no position for it.
            assert torch.equal(ours.output_positions[:8], tensor)
            assert ours.positions().tolist() == [*unit.positions().tolist()] == [0, unit.weights, unit.weights]
        else:
            assert torch.equal(getattr(ours, name), tensor), name


@pytest.mark.parametrize("case", range(5))
def test_official_codes_are_ours(golden, case):
    code = code_of(golden[f"code{case}.counts"].numpy())
    assert np.array_equal(code.lengths, golden[f"code{case}.lengths"].numpy())
    assert np.array_equal(code.values, golden[f"code{case}.values"].numpy())
    assert np.array_equal(code.luts(), golden[f"code{case}.luts"].numpy())


# --- codes ----------------------------------------------------------------------------------------------


def kraft(code: Code) -> float:
    used = code.lengths[code.lengths > 0].astype(float)
    return float((2.0**-used).sum())


def test_codes_are_prefix_codes_also_when_they_had_to_be_changed():
    scattered = np.zeros(256, np.int64)  # half of all is one exponent; the others' codes have nine bits or so
    scattered[:240] = 100
    scattered[7] = 24_000
    assert len(huffman(scattered).prefixes()) > TABLES
    for counts in (fibonacci(44), scattered, np.eye(1, 256, 5, dtype=np.int64)[0]):
        code = code_of(counts)
        assert kraft(code) == 1
        assert len(code.prefixes()) <= TABLES
        assert code.longest <= 32
        codes = sorted((int(v) << (32 - int(n)), int(n)) for v, n in zip(code.values, code.lengths) if n)
        assert all(a + (1 << (32 - n)) == b for (a, n), (b, _) in pairwise(codes))


def test_limited_lengths_are_the_best_there_are():
    counts = np.zeros(256, np.int64)
    counts[:20] = np.arange(1, 21) ** 3
    free = huffman(counts).lengths
    assert np.array_equal(np.sort(limited_lengths(counts, 20)[free > 0]), np.sort(free[free > 0]))

    def cost(lengths):
        return int((counts * lengths[:256]).sum() + lengths[256])

    tight = limited_lengths(counts, 5)
    assert tight.max() == 5
    assert kraft(canonical(tight)) == 1
    assert cost(free) < cost(tight) <= cost(np.where(free > 0, 5, 0))


def test_gaps_are_packed_into_five_bits():
    gaps = np.random.default_rng(0).integers(0, 32, 512).astype(np.uint8)
    packed = pack_gaps(gaps)
    assert packed.size == 320
    assert np.array_equal(unpack_gaps(packed), gaps)
    assert packed[0] == gaps[0] << 3 | gaps[1] >> 2


# --- hostile units --------------------------------------------------------------------------------------


def test_units_of_random_bytes_and_cut_tensors_are_refused_or_decoded_within_bounds():
    weights = gaussian(30_000)
    unit, draw = encode([weights]), np.random.default_rng(1)
    guarded = torch.full((weights.numel() + 8192,), -7.0, dtype=torch.bfloat16)
    for number in range(300):
        tensors = dict(unit.tensors())
        for name in draw.choice(["luts", "encoded_exponent", "gaps"], draw.integers(1, 4)):
            shape = (int(draw.integers(2, 19)), 256) if name == "luts" else tensors[name].shape
            tensors[name] = torch.from_numpy(draw.integers(0, 256, tuple(shape)).astype(np.uint8))
        if number % 3 == 0:
            name = draw.choice(["encoded_exponent", "sign_mantissa", "output_positions", "gaps"])
            tensors[name] = tensors[name][: int(draw.integers(tensors[name].numel()))]
        hostile = Unit(**tensors)
        decoder = decode if number % 10 else decode_lanes
        with contextlib.suppress(Damaged):
            decoder(hostile, guarded[4096:-4096][: hostile.weights])
        assert (guarded[:4096] == -7).all()
        assert (guarded[-4096:] == -7).all()


@pytest.mark.parametrize("name", ["encoded_exponent", "sign_mantissa", "output_positions", "gaps"])
def test_truncated_tensors_are_refused_in_one_line(name):
    unit = encode([gaussian(30_000)])
    cut = Unit(**{**unit.tensors(), name: getattr(unit, name)[:-1]})
    for decoder in DECODERS.values():
        with pytest.raises(Damaged, match=r"^[^\n]*again$"):
            decoder(cut)


def test_positions_that_leave_the_output_are_refused():
    unit = encode([gaussian(30_000)])
    for positions in ([0, 40_000, 25_000, 30_000], [5, 12_000, 25_000, 30_000], [0, 12_000, 25_000, 30_001]):
        fake = np.array(positions, "<u4").view(np.uint8)
        damaged = Unit(**{**unit.tensors(), "output_positions": torch.from_numpy(fake)})
        for decoder in DECODERS.values():
            with pytest.raises(Damaged, match="output_positions"):
                decoder(damaged)


def test_decoding_into_a_tensor_that_does_not_fit_is_refused():
    unit = encode([gaussian(100)])
    for out in (torch.empty(99, dtype=torch.bfloat16), torch.empty(100), torch.empty(200, dtype=torch.bfloat16)[::2]):
        with pytest.raises(ValueError, match="contiguous bfloat16 tensor of 100"):
            decode(unit, out)


def test_the_kernel_gives_the_same_with_several_threads():
    weights = gaussian(300_000)
    unit, threads = encode([weights]), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert same(decode(unit), weights)
    finally:
        torch.set_num_threads(threads)


# --- models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gqa", "qwen2", "qwen3", "neox", "opt"])
@pytest.mark.parametrize("single", [True, False], ids=["one-file", "file-a-unit"])
def test_folders_load_through_transformers_bit_by_bit(kind, single, tmp_path):
    tiny(kind).save_pretrained(tmp_path / "original")
    model, ids = loaded(tmp_path / "original"), random_ids(2, 9)
    wanted = model(ids).logits
    compress_model(model, save_path=tmp_path / "small", save_single_file=single)
    assert same(model(ids).logits, wanted)
    assert (tmp_path / "small" / "model_layers_0.safetensors").exists() == (not single and kind in ("gqa", "qwen2", "qwen3"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert same(again(ids).logits, wanted)
    assert size(again).bits == size(model).bits < 11.3
    assert again.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)
    save(again, tmp_path / "third")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "third")(ids).logits, wanted)


def test_folders_of_the_official_package_load_too(folder, tmp_path):
    """Its config.json has dfloat11_config and no word of quantisation."""
    wanted, ids = loaded(folder)(random_ids(2, 9)).logits, random_ids(2, 9)
    compress_model(loaded(folder), save_path=tmp_path / "small")
    config = json.loads((tmp_path / "small/config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "dfloat11"}
    assert config["dfloat11_config"] == {
        "version": "0.5.0",
        "threads_per_block": [512],
        "bytes_per_thread": 8,
        "pattern_dict": {
            r"model\.embed_tokens": [],
            r"model\.layers\.\d+": [
                *(f"self_attn.{name}_proj" for name in "qkvo"),
                *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
            ],
            "lm_head": [],
        },
    }
    (tmp_path / "small/config.json").write_text(json.dumps(config))
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "small")(ids).logits, wanted)
    for options in ({}, {"cpu_offload": True}):
        assert same(DFloat11Model.from_pretrained(tmp_path / "small", **options)(ids).logits, wanted)
    blank = loaded(folder)
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.zero_()
    assert same(DFloat11Model.from_pretrained(tmp_path / "small", bfloat16_model=blank)(ids).logits, wanted)


def test_units_on_other_devices_are_decoded_in_lanes(folder, tmp_path, monkeypatch):
    """There is no other device here: their decoder takes the place of the kernel, with tensors copied for each use."""
    monkeypatch.setattr(runtime, "decode", decode_lanes)
    compress_model(loaded(folder), save_path=tmp_path / "small", check_correctness=False)
    model = DFloat11Model.from_pretrained(tmp_path / "small", cpu_offload=True)
    _, module, decompressor = next(compressed(model))
    assert set(decompressor.host) == {"encoded_exponent", "sign_mantissa"}
    assert "encoded_exponent" not in dict(module.named_buffers())
    assert same(model(random_ids(2, 9)).logits, loaded(folder)(random_ids(2, 9)).logits)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")


def test_any_model_with_a_pattern_dict_is_compressed(tmp_path):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(30, 16), nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 16))).bfloat16()

    model, ids = build(), torch.arange(30)
    wanted = model(ids)
    compress_model(model, {"0": [], "1": ["0", "2"]}, tmp_path / "small")
    assert same(model(ids).detach(), wanted.detach())
    blank = build()
    for parameter in blank.parameters():
        parameter.data.zero_()
    DFloat11Model.from_pretrained(tmp_path / "small", bfloat16_model=blank)
    assert same(blank(ids).detach(), wanted.detach())
    with pytest.raises(ValueError, match="no model of transformers; give its pattern_dict"):
        compress_model(build(), save_path=tmp_path / "other")


def test_the_work_can_be_shared_by_processes(folder, tmp_path):
    ids = random_ids(2, 9)
    for block_range in ((3, 5), (0, 3)):  # 5 units
        compress_model(loaded(folder), save_path=tmp_path / "small", block_range=block_range, save_single_file=False)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "small")(ids).logits, loaded(folder)(ids).logits)
    with pytest.raises(ValueError, match="block_range needs save_single_file=False"):
        compress_model(loaded(folder), save_path=tmp_path / "small", block_range=(0, 3))


def test_weights_are_gone_after_use_and_the_buffer_is_one(folder):
    model, ids = DFloat11().compress(loaded(folder)), random_ids(1, 9)
    seen = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(
            lambda module, args: seen.append(module.up_proj.weight.untyped_storage().data_ptr())
        )
    model(ids)
    assert len(seen) == 3
    assert len(set(seen)) == 1
    with pytest.raises(AttributeError, match="weight"):
        model.model.layers[0].mlp.up_proj(torch.zeros(1, 64).bfloat16())
    logits = model(ids).logits
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.float().sum().backward()  # the weights of all blocks but the last are overwritten
    with torch.inference_mode():
        model(ids)
    model(ids)


def test_other_dtypes_compute_with_the_same_weights(folder, tmp_path):
    compress_model(loaded(folder), save_path=tmp_path / "small")
    ids = random_ids(2, 9)
    wanted = loaded(folder).float()(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)(ids).logits, wanted)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").dtype == torch.bfloat16


@pytest.mark.parametrize("per_block", [True, False])
def test_the_parts_of_the_method_can_be_switched_off(folder, per_block):
    model = DFloat11(embeddings=False, per_block=per_block, check_correctness=False).compress(loaded(folder))
    assert len(list(compressed(model))) == (3 if per_block else 21)
    assert isinstance(model.lm_head.weight, nn.Parameter)
    assert same(model(random_ids(1, 9)).logits, loaded(folder)(random_ids(1, 9)).logits)


def test_tied_weights_stay_and_are_refused_when_they_are_named(tmp_path):
    tiny("gqa", tie_word_embeddings=True).save_pretrained(tmp_path / "original")
    model = loaded(tmp_path / "original")
    assert list(infer_patterns(model)) == [r"model\.layers\.\d+"]
    for pattern in (r"model\.embed_tokens", "lm_head"):
        with pytest.raises(ValueError, match=r"shares its weight with .*; leave it out of pattern_dict"):
            DFloat11({pattern: []}).compress(loaded(tmp_path / "original"))
    ids = random_ids(2, 9)
    wanted = model(ids).logits
    for single in (True, False):
        compress_model(loaded(tmp_path / "original"), save_path=tmp_path / "small", save_single_file=single)
        assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "small")(ids).logits, wanted)
        shutil.rmtree(tmp_path / "small")


def test_what_cannot_be_compressed_is_named_before_anything_is_changed(folder):
    for bad, reason in ((2.0**120, r"model\.layers\.1\.mlp\.up_proj has an infinity"), (float("inf"), "inf or nan")):
        model = loaded(folder)
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = bad
        with pytest.raises(ValueError, match=reason):
            DFloat11().compress(model)
        assert isinstance(model.model.embed_tokens.weight, nn.Parameter)
    patterns = {
        "'nothing' matches no module": {"nothing": []},
        "is no regular expression": {"(": []},
        "list the layers in it": {r"model\.layers\.0": []},
        "has no 'mlp.side_proj'": {r"model\.layers\.0": ["mlp.side_proj"]},
        "in the units": {r"model\.layers\.0": ["mlp.up_proj"], r"model\.layers\.0\.mlp\.up_proj": []},
        "neither nn.Linear nor nn.Embedding": {r"model\.layers\.0": ["input_layernorm"]},
        "must map regular expressions": ["lm_head"],
    }
    for reason, pattern_dict in patterns.items():
        with pytest.raises(ValueError, match=reason.replace("(", r"\(")):
            DFloat11(pattern_dict).compress(loaded(folder))
    model = DFloat11().compress(loaded(folder))
    with pytest.raises(ValueError, match="compressed already"):
        DFloat11().compress(model)
    with pytest.raises(ValueError, match="save_path must name a folder"):
        compress_model(loaded(folder))


def test_budget():
    assert DFloat11().at_budget(11.5, [(8, 8)]) == DFloat11()
    with pytest.raises(Unreachable, match=r"11\.00 bits"):
        DFloat11().at_budget(8, [(8, 8)])


# --- files ----------------------------------------------------------------------------------------------


@pytest.fixture
def small(folder, tmp_path) -> Path:
    compress_model(loaded(folder), save_path=tmp_path / "small")
    return tmp_path / "small"


def test_inspect_tells_what_is_and_what_would_be(folder, small):
    forecast, report = inspect(folder), inspect(small)
    assert not forecast.compressed
    assert report.compressed
    key = lambda unit: unit.name  # noqa: E731
    assert sorted(forecast.units, key=key) == sorted(report.units, key=key)
    assert (forecast.nbytes, forecast.bf16_bytes) == (report.nbytes, report.bf16_bytes)
    for unit in report.units:
        weights = decode(unit_of(loaded(small), unit.name))
        share = torch.unique(torch.from_numpy(split(weights)[0]), return_counts=True)[1] / weights.numel()
        assert unit.entropy == pytest.approx(float(-(share * share.log2()).sum()), abs=1e-4)
        assert unit.entropy <= unit.mean_length < unit.entropy + 0.1
        assert unit.bits == pytest.approx(unit_of(loaded(small), unit.name).bits_per_weight)
    assert f"{report.ratio:.1%} of {report.bf16_bytes:,}" in str(report)
    assert sum(tensor.nbytes for tensor in load_file(small / "model.safetensors").values()) == report.nbytes


def test_verify_finds_what_is_wrong(folder, small, tmp_path):
    assert str(verify(small)) == "5 units of 104,576 weights are sound; not compared with an original"
    assert verify(small, folder).compared == 104_576
    tensors = load_file(small / "model.safetensors")

    def changed(name: str, place: int, bits: int = 1) -> Path:
        other = {**tensors, name: tensors[name].clone()}
        other[name][place] ^= bits
        shutil.copytree(small, tmp_path / "changed", dirs_exist_ok=True)
        save_file(other, tmp_path / "changed/model.safetensors", {"format": "pt"})
        return tmp_path / "changed"

    with pytest.raises(Damaged, match=r"model\.layers\.1: gaps or output_positions"):
        verify(changed("model.layers.1.gaps", 7))
    with pytest.raises(Damaged, match=r"model\.layers\.0: "):
        verify(changed("model.layers.0.encoded_exponent", 100, 255))
    assert verify(changed("lm_head.sign_mantissa", 100)).units == 5  # nothing tells, but
    with pytest.raises(Damaged, match=r"lm_head\.weight is not that of the original"):
        verify(changed("lm_head.sign_mantissa", 100), folder)


def test_folders_that_are_not_whole_are_refused_in_one_line(folder, small):
    def refused(reason: str, everywhere: bool = True) -> None:
        calls = [lambda: AutoModelForCausalLM.from_pretrained(small), lambda: DFloat11Model.from_pretrained(small)]
        for call in [*calls, lambda: verify(small)][: None if everywhere else 2]:
            with pytest.raises(ValueError, match=reason) as caught:
                call()
            assert "\n" not in str(caught.value)

    config, tensors = json.loads((small / "config.json").read_text()), load_file(small / "model.safetensors")

    def write(changes: dict, without: str = "-", **other: torch.Tensor) -> None:
        new = {**config, "dfloat11_config": {**config["dfloat11_config"], **changes}}
        (small / "config.json").write_text(json.dumps(new))
        kept = {name: tensor for name, tensor in tensors.items() if without not in name}
        save_file({**kept, **other}, small / "model.safetensors", {"format": "pt"})

    write({"version": "0.6.0"})
    refused(r"format 0\.6\.0 is not supported, only 0\.2 to 0\.5\.0")
    write({"version": "0.1.0"})
    refused(r"format 0\.1\.0 is not supported")
    write({"threads_per_block": [256]})
    refused("only blocks of 512 threads of 8 bytes")
    write({"pattern_dict": None})
    refused("no dfloat11_config with a pattern_dict")
    write({}, "model.layers.1.")
    refused(r"the files hold nothing for model\.layers\.1\.", everywhere=False)
    write({}, "model.layers.1.gaps")
    refused(r"model\.layers\.1.*gaps")
    write({}, "luts")
    refused("the files hold no compressed unit", everywhere=False)
    write({}, **{"lm_head.sign_mantissa": tensors["lm_head.sign_mantissa"][:-1].clone()})
    refused(r"lm_head: ")
    write({})
    (small / "model.safetensors").write_bytes((small / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged .*; copy it again"):
        verify(small)
    (small / "model.safetensors").unlink()
    for call in (verify, inspect):
        with pytest.raises(ValueError, match="has no safetensors files"):
            call(small)
    (small / "config.json").unlink()
    for call in (verify, inspect, DFloat11Model.from_pretrained):
        with pytest.raises(ValueError, match=r"has no config\.json"):
            call(small)
    with pytest.raises(ValueError, match="no dfloat11_config"):
        verify(folder)


def test_a_stream_that_is_cut_short_is_found_when_it_is_decoded(small):
    tensors = load_file(small / "model.safetensors")
    tensors["lm_head.encoded_exponent"] = tensors["lm_head.encoded_exponent"][:-9].clone()
    save_file(tensors, small / "model.safetensors", {"format": "pt"})
    with pytest.raises(Damaged, match="lm_head: the stream is damaged in block 0 or after"):
        verify(small)
    with pytest.raises(Damaged, match="the stream is damaged in block 0 or after"):
        AutoModelForCausalLM.from_pretrained(small)(random_ids(1, 5))
