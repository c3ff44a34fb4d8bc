"""What DeepSeek-Coder-6.7B takes in additive codes: in the official layout and with codes packed without gaps.

    python benchmarks/aqlm_sizes.py

Counted from the shapes that the model's config gives, for the codebooks of the study: the linear layers of the decoder
blocks are compressed, all else stays in 16 bits. The official layout stores a code above 8 bits as a 16-bit integer; 12 bits
take as much as 16. Nothing is timed and no weights are needed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from broadsheet.core.records import Record, now, provenance, write_json
from broadsheet.methods.weights.aqlm import AQLM
from broadsheet.methods.weights.base import shapes

RESULTS = Path(__file__).parent / "results" / "aqlm_sizes.records.json"
MODEL = "DeepSeek-Coder-6.7B"
CONFIG = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32256
)
#: the study's codebooks, by the bits it calls them
ARMS = {8: AQLM(4, 15), 4: AQLM(2, 15), 3: AQLM(2, 12), 2: AQLM(1, 15)}


def main() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    layers = shapes(model)
    weights = sum(rows * columns for rows, columns in layers)
    rest = sum(2 * p.numel() for p in model.parameters()) - 2 * weights
    bits = {(16, layout): 16.0 for layout in ("packed", "official")}
    for called, arm in ARMS.items():
        bits[called, "packed"] = arm.stored_bits(layers)
        unused = 16 - arm.nbits_per_codebook
        bits[called, "official"] = bits[called, "packed"] + arm.num_codebooks * unused / arm.in_group_size
    table, records = Table("called", "layout", "bits a weight", "GB"), list[Record]()
    for (called, layout), each in bits.items():
        held = rest + each * weights / 8
        table.add_row(f"{called} bits", layout, f"{each:.3f}", f"{held / 1e9:.2f}")
        records.append(
            Record(
                paper="quantizing-code-llms", method="aqlm", bench="aqlm-sizes", metric="bytes", value=held, unit="bytes",
                model=MODEL, setting={"called": called, "layout": layout, "bits": each}, time=now(), **provenance(),
            )
        )  # fmt: skip
    write_json(records, str(RESULTS))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
