"""The four laws of a long context on this machine, and users for real beside the simulation.

python benchmarks/long_context_peak.py [--seconds 12] [--parts laws,loop]

A Llama with random weights and large caches (8 layers of 8 key/value heads of 64, 32 KB a token in fp32), one thread.

laws: prefill of 256 to 4,096 tokens and the linear and quadratic law through them; a decode step against the length of the
cache; a cache's way into a memory-mapped file and back.
loop: users who repeat rounds, their caches within a budget of four (or, with a quarter of the tokens kept, sixteen); answers
an hour measured and simulated from service times that were measured alone; the knee is the largest number of users with at
least 95 % of the best rate. Reading takes half of what all that fit take to be served, so that the machine is busy before
the budget is full and what comes behind it is the swapping.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from broadsheet.core.models import with_cache
from broadsheet.core.perf.measure import bandwidth, peak
from broadsheet.core.perf.timing import pinned
from broadsheet.core.records import Record, now, provenance, read_json, write_results
from broadsheet.methods.estimates.long_context_peak import Session, simulate
from broadsheet.methods.estimates.long_context_peak.loop import CacheBudget, median, run_loop, temporary_machine

OUT = Path(__file__).parent / "results" / "long_context_peak.records.json"
LAYERS, HEADS, HEAD_DIM = 8, 8, 64
PREFILLS = (256, 512, 1024, 1536, 2048, 3072, 4096)
TOKENS, FIT = 1024, 4
#: part of the tokens that is kept -> numbers of users
USERS = {1.0: (1, 2, 3, 4, 5, 6, 8, 12), 0.25: (4, 8, 12, 15, 16, 17, 18, 20, 24, 32, 48)}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=HEAD_DIM, max_position_embeddings=8192,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def laws(shared: dict[str, Any]) -> list[Record]:
    net, records = model(), []

    def record(metric: str, value: float, unit: str = "", **setting: Any) -> None:
        records.append(
            Record(method="long-context-peak", metric=metric, value=float(value), unit=unit, setting=setting, **shared)
        )
        print(f"{metric} {setting} {value:.6g} {unit}", flush=True)

    @torch.inference_mode()
    def prefill(ids: torch.Tensor) -> DynamicCache:
        cache = DynamicCache(config=net.config)
        net(ids, **with_cache(cache), use_cache=True, logits_to_keep=1)
        return cache

    seconds = []
    for tokens in PREFILLS:
        ids = torch.randint(1, 512, (1, tokens))
        seconds.append(median(lambda ids=ids: prefill(ids), 5))
        record("prefill_seconds", seconds[-1], "s", tokens=tokens)
    n, y = np.array(PREFILLS, dtype=float), np.array(seconds)
    terms = np.stack([np.ones_like(n), n, n**2], 1) / y[:, None]  # relative errors: each length counts the same
    fitted = np.linalg.lstsq(terms, np.ones_like(n), rcond=None)[0]
    predicted = np.stack([np.ones_like(n), n, n**2], 1) @ fitted
    record("prefill_r2", 1 - ((y - predicted) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    reached = peak(torch.float32)
    operations = 2 * LAYERS * HEADS * HEAD_DIM  # a causal layer's 4 n² d H, halved
    record("peak", reached, "op/s")
    record("quadratic_ratio", fitted[2] / (operations / reached), "measured / 2 L H d n² at the peak")
    rate, lengths, steps = bandwidth(), (2048, 4096, 8000, 12000, 16000), []
    record("bandwidth", rate, "B/s")
    per_token = 2 * LAYERS * HEADS * HEAD_DIM * 4
    for tokens in lengths:
        steps.append(median(lambda tokens=tokens: attend(tokens), 7))
        record("attention_seconds", steps[-1], "s", tokens=tokens)
    slope = np.polyfit(lengths, steps, 1)[0]
    record("decode_slope_ratio", slope / (per_token / rate), "measured / bytes a token over bandwidth")
    machine, folder = temporary_machine(net)
    with folder:
        for tokens in (1024, 4096):
            visitor = machine.visitor(tokens, 1)
            machine.prefill(visitor)
            size = machine.size(tokens)

            def switch(visitor: Any = visitor) -> None:
                machine.swap_out(visitor)
                machine.swap_in(visitor)

            record("switch_bytes_per_second", 2 * size / median(switch, 9), "B/s", tokens=tokens)
    return records


_KV: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}


@torch.inference_mode()
def attend(tokens: int) -> None:
    """What a decode step does with the caches of all layers: one query a head against every key and value."""
    if tokens not in _KV:
        _KV.clear()
        _KV[tokens] = [
            (torch.rand(1, HEADS, tokens, HEAD_DIM), torch.rand(1, HEADS, tokens, HEAD_DIM)) for _ in range(LAYERS)
        ]
    query = torch.rand(1, HEADS, 1, HEAD_DIM)
    for keys, values in _KV[tokens]:
        torch.nn.functional.scaled_dot_product_attention(query, keys, values)


def loop(shared: dict[str, Any], seconds: float) -> list[Record]:
    net, records = model(), []
    whole, folder = temporary_machine(net)
    with folder:
        room = FIT * whole.size(TOKENS)
    for keep, counts in USERS.items():
        machine, folder = temporary_machine(net, keep)
        with folder:
            service = machine.service(TOKENS, room)
            fit = room // machine.size(TOKENS)
            session = Session(TOKENS, 1_000_000, 1, fit / 2 * service.step([TOKENS]))
            for users in counts:
                budget = CacheBudget(room)
                real = run_loop(machine, session, users, budget, seconds + 0.6 * users)
                simulated = simulate(
                    service, session, users, policy="lru", overlap=False, random_think=False, seconds=real.seconds
                )
                setting = {"keep": keep, "fit": fit, "users": users, "tokens": TOKENS}
                for method, report in (("measured", real), ("simulated", simulated)):
                    values = {
                        "rounds_per_hour": report.steady_rounds_per_hour,
                        "swaps_per_round": report.swaps / max(report.rounds, 1),
                    }
                    for metric, value in values.items():
                        records.append(
                            Record(method=method, metric=metric, value=value, n=report.rounds, setting=setting, **shared)
                        )
                ratio = simulated.steady_rounds_per_hour / real.steady_rounds_per_hour
                told = [round(r.steady_rounds_per_hour) for r in (real, simulated)]
                what = f"keep {keep} fit {fit} users {users}"
                print(f"{what}: measured {told[0]} simulated {told[1]} answers/h, ratio {ratio:.3f}", flush=True)
            for method in ("measured", "simulated"):
                rates = {
                    r.setting["users"]: r.value
                    for r in records
                    if r.method == method and r.metric == "rounds_per_hour" and r.setting["keep"] == keep
                }
                knee = max(users for users, rate in rates.items() if rate >= 0.95 * max(rates.values()))
                records.append(
                    Record(
                        method=method, metric="knee", value=knee, unit="users", setting={"keep": keep, "fit": fit}, **shared
                    )
                )
                print(f"keep {keep}: knee of {method} at {knee} users, {fit} fit", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--parts", default="laws,loop")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    parts = given.parts.split(",")
    shared = {"paper": "long-context-peak", "bench": "", "device": "cpu", "time": now(), **provenance()}
    kept = (
        [record for record in read_json(given.out) if record.bench.rpartition("-")[2] not in parts]
        if given.out.exists()
        else []
    )
    with pinned(1):
        if "laws" in parts:
            kept += laws({**shared, "bench": "long-context-peak-laws"})
        if "loop" in parts:
            kept += loop({**shared, "bench": "long-context-peak-loop"}, given.seconds)
    write_results(kept, given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
