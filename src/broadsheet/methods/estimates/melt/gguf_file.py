"""GGUF files of Llama models, written with the ``gguf`` package, so that llama.cpp runs what transformers runs.

Covered are transformers models of type llama and mistral with a byte-level BPE tokenizer; llama.cpp's own
``convert_hf_to_gguf.py`` knows many more. llama.cpp turns pairs of neighbours where transformers turns halves, so rows of
the query and key projections are reordered. Linear layers have the format that is asked for, norms 32 bits, and the
embedding and output layer 8 where that is below 8 (llama.cpp takes Q6_K there). llama.cpp cannot cut numbers as the
built-in tokenizer does: tokens come from the transformers tokenizer, and the one in the file is for other readers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: formats that the gguf package writes, and those that llama.cpp makes of an f32 file
WRITTEN = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
MADE = ("q6_k", "q5_k", "q4_k", "q3_k", "q2_k")
FORMATS = (*WRITTEN, *MADE)
#: values of llama_ftype: the medium mixtures, as the paper's q4_k and q3_k
_FTYPE = {"q2_k": 10, "q3_k": 12, "q4_k": 15, "q5_k": 17, "q6_k": 18}


def need_gguf() -> Any:
    """The gguf package. Raises ValueError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ValueError("writing GGUF files needs the gguf package: pip install 'broadsheet[llamacpp]'") from None
    return gguf


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path, form: str = "f16") -> Path:
    """Writes ``model`` in a format of `FORMATS`; whole or not at all. Raises ValueError for models that are not covered."""
    if form not in FORMATS:
        raise ValueError(f"unknown quantisation '{form}'; there are {', '.join(FORMATS)}")
    gguf, path, config = need_gguf(), Path(path), model.config
    if config.model_type not in ("llama", "mistral"):
        raise ValueError(f"a {config.model_type} model is not covered; use llama.cpp's convert_hf_to_gguf.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    plain = "f32" if form in MADE else form
    writer = gguf.GGUFWriter(part, "llama")
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    writer.add_name((config.name_or_path or "llama").rsplit("/", 1)[-1])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rotary embeddings of type {rope['rope_type']} are not covered; use convert_hf_to_gguf.py")
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if plain == "f32" else f"MOSTLY_{plain.upper()}"))
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    for name, values, wide in _tensors(model, head_dim):
        kind = _kind(gguf, plain, wide, values)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if form in MADE:
        part = _made(part, form)
    part.replace(path)
    return path


def _kind(gguf: Any, form: str, wide: bool, values: NDArray[np.float32]) -> Any:
    """The type of a tensor. ``wide``: embedding or output layer."""
    types = gguf.GGMLQuantizationType
    if values.ndim == 1:
        return types.F32
    if form[0] == "q":
        if values.shape[-1] % 32:
            return types.F16  # blocks of 32 do not fit
        if wide:
            return types.Q8_0
    return types[form.upper()]


def _tensors(model: PreTrainedModel, head_dim: int) -> Iterator[tuple[str, NDArray[np.float32], bool]]:
    """Name in the file, values and whether it is the embedding or output layer."""
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        owner, _, leaf = name.removeprefix("model.").rpartition(".")
        if owner == "embed_tokens":
            yield "token_embd.weight", values, True
        elif owner == "norm":
            yield "output_norm.weight", values, False
        elif owner == "lm_head":
            if not model.config.tie_word_embeddings:
                yield "output.weight", values, True
        else:
            _, number, inner = owner.split(".", 2)
            if inner in ("self_attn.q_proj", "self_attn.k_proj"):
                values = _interleaved(values, head_dim)
            yield f"blk.{number}.{names[inner]}.{leaf}", np.ascontiguousarray(values), False


def _interleaved(values: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Rows of every head from halves to pairs: 0, d/2, 1, d/2 + 1, ..."""
    shape = values.shape
    return values.reshape(-1, 2, head_dim // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = json.loads(backend.to_str()) if backend else {}
    model = description.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ValueError("only byte-level BPE tokenizers are written; use llama.cpp's convert_hf_to_gguf.py for this model")
    special = {entry["id"]: entry["content"] for entry in description["added_tokens"]}
    tokens = {number: text for text, number in model["vocab"].items()} | special
    texts = [tokens.get(number, f"<|unused {number}|>") for number in range(vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    # 1: normal, 3: control, 5: unused
    writer.add_token_types([3 if number in special else 1 if number in tokens else 5 for number in range(vocabulary)])
    merges = model["merges"]
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in merges])
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _made(source: Path, form: str) -> Path:
    """A K-quant of an f32 file, made by llama.cpp itself."""
    from .llamacpp import need_llama

    llama = need_llama()
    target = source.with_name(source.name + "." + form)
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = _FTYPE[form], 1
    status = llama.llama_model_quantize(str(source).encode(), str(target).encode(), parameters)
    source.unlink()
    if status:
        target.unlink(missing_ok=True)
        raise ValueError(f"llama.cpp could not make {form} of this model (status {status}); K-quants need widths of 256")
    return target
