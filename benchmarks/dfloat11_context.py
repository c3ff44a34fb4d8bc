"""How much longer a context fits into the same memory with DFloat11: by arithmetic, and until a limited process runs out.

    python benchmarks/dfloat11_context.py [--layers 8] [--width 768] [--room 1.05,1.1,1.25,1.5]

A Llama-type model of random bfloat16 weights (deviation 0.02) is saved as it is and compressed. For each ``--room`` the
memory is so many times the 16-bit model's bytes; what the weights leave (DFloat11's workspace taken off too) is for the
cache. By arithmetic a context has so many tokens as their keys and values fit into that. The real run loads each model in
a process of its own, lets the process's private memory (RLIMIT_DATA) grow by no more than the same bytes, counted from
before loading, and feeds tokens in pieces of 32 until an allocation fails. There the cache is not alone: activations take
room, and a layer's cache is copied when it grows. The ratio depends on the room alone: near the model's own size any saving
is many times what was left.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

import broadsheet  # noqa: F401  # teaches transformers the format
from broadsheet.core.models import cache_of, with_cache
from broadsheet.core.records import Record, now, provenance, write_json
from broadsheet.methods.weights.base import size
from broadsheet.methods.weights.dfloat11 import DFloat11
from broadsheet.methods.weights.quantiser import save

RESULTS = Path(__file__).parent / "results" / "dfloat11_context.records.json"
PIECE = 32


def private_bytes() -> int:
    """What RLIMIT_DATA limits: VmData of this process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    return int(line.split()[1]) * 1024


@torch.inference_mode()
def child(folder: str, room: int) -> None:
    """Prints how many tokens fitted."""
    torch.set_num_threads(1)
    disable_progress_bar()
    piece, tokens = torch.zeros(1, PIECE, dtype=torch.long), 0
    warm = AutoModelForCausalLM.from_pretrained(Path(folder).with_name("tiny"), dtype="auto")
    warm(piece)  # what torch and compiled kernels take for themselves is there now, in both processes
    limit = private_bytes() + room
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    cache = model(piece, use_cache=True, logits_to_keep=1).past_key_values
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        while True:
            tokens = cache.get_seq_length()
            cache = cache_of(model(piece, **with_cache(cache), logits_to_keep=1))
    except (MemoryError, RuntimeError):
        print(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--room", default="1.05,1.1,1.25,1.5")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "BYTES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], int(arguments.child[1]))
        return
    disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.width, intermediate_size=3 * arguments.width, num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64, vocab_size=1000, max_position_embeddings=2**20,
    )  # fmt: skip
    per_token = 2 * 2 * arguments.layers * arguments.width
    table, records = Table("room", "method", "bytes", "tokens by arithmetic", "tokens that fitted"), list[Record]()
    with tempfile.TemporaryDirectory() as folder:
        model = LlamaForCausalLM(config).bfloat16()
        model.save_pretrained(f"{folder}/bf16")
        whole = size(model).bytes
        small = DFloat11().compress(model)
        save(small, f"{folder}/dfloat11")
        tiny = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=100)
        save(DFloat11().compress(LlamaForCausalLM(tiny).bfloat16()), f"{folder}/tiny")
        small(torch.zeros(1, 1, dtype=torch.long))  # makes the workspace
        held = {"bf16": whole, "dfloat11": size(small).bytes}
        for room in map(float, arguments.room.split(",")):
            counts: dict[str, tuple[int, int]] = {}
            for name, taken in held.items():
                command = [sys.executable, __file__, "--child", f"{folder}/{name}", str(int(room * whole))]
                fitted = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
                counts[name] = (int(room * whole - taken) // per_token, fitted)
                table.add_row(f"{room:g}", name, f"{taken:,}", *(f"{count:,}" for count in counts[name]))
            for place, how in enumerate(("arithmetic", "real run")):
                ours, theirs = counts["dfloat11"][place], counts["bf16"][place]
                setting = {"room": room, "how": how, "tokens": ours, "against": theirs, "parameters": small.num_parameters()}
                records.append(
                    Record(
                        paper="dfloat11", method="DFloat11", bench="dfloat11-context", metric="context_ratio",
                        value=ours / max(theirs, 1), unit="times as many tokens", setting=setting,
                        time=now(), **provenance(),
                    )
                )  # fmt: skip
    write_json(records, str(RESULTS))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
