"""The four laws of a long context on this machine, and users for real beside the simulation.

python benchmarks/long_context_peak.py [--seconds 12] [--parts laws,loop,loop-quarter]

A Llama with random weights and large caches (8 layers of 8 key/value heads of 64, 32 KB a token in fp32), one thread.

laws: prefill of 256 to 4,096 tokens and the linear and quadratic law through them, also with heads of 128; what the products
and the softmax of a flash kernel take alone, which the quadratic term is made of; a decode step against the length of the
cache, beside merely reading it; a cache's way into a memory-mapped file and back. All are the best of repeats, in CPU time.
loop: users who repeat rounds, their caches within a budget of four; loop-quarter: with a quarter of the tokens kept, so
sixteen. Answers an hour (of CPU time, and of reading, which is not waited for), measured and simulated from service times
that were measured without users; the knee is the largest number of users with at least 95 % of the best rate. Reading takes
half of what all that fit take to be served, so that the machine is busy before the budget is full, and what comes behind it
is the swapping.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from broadsheet.core.models import with_cache
from broadsheet.core.perf.measure import bandwidth, peak
from broadsheet.core.perf.timing import pinned, repeated
from broadsheet.core.records import Record, now, provenance, read_json, write_results
from broadsheet.methods.estimates.long_context_peak import Session, simulate
from broadsheet.methods.estimates.long_context_peak.loop import CacheBudget, OwnClock, run_loop, temporary_machine

OUT = Path(__file__).parent / "results" / "long_context_peak.records.json"
LAYERS, HEADS, HEAD_DIM = 8, 8, 64
PREFILLS = (256, 512, 1024, 1536, 2048, 3072, 4096)
TOKENS, FIT = 1024, 4
#: name of a part -> the share of the tokens that is kept, and numbers of users
LOOPS = {"loop": (1.0, (1, 2, 3, 4, 5, 6, 8, 12)), "loop-quarter": (0.25, (4, 8, 12, 15, 16, 17, 18, 20, 24, 32))}
#: rows of queries and of keys that torch's flash attention takes at a time on a CPU, from 768 queries on
BLOCK = (256, 512)


def model(head_dim: int = HEAD_DIM) -> LlamaForCausalLM:
    """Of the same width of attention, whatever its heads' size."""
    torch.manual_seed(0)
    heads = HEADS * HEAD_DIM // head_dim
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=head_dim, max_position_embeddings=8192,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def laws(shared: dict[str, Any]) -> list[Record]:
    records = []

    def record(metric: str, value: float, unit: str = "", **setting: Any) -> None:
        records.append(
            Record(method="long-context-peak", metric=metric, value=float(value), unit=unit, setting=setting, **shared)
        )
        print(f"{metric} {setting} {value:.6g} {unit}", flush=True)

    for head_dim in (HEAD_DIM, 2 * HEAD_DIM):
        quadratic_law(record, head_dim)
    rate = bandwidth().value
    record("bandwidth", rate, "B/s")
    per_token = 2 * LAYERS * HEADS * HEAD_DIM * 4
    lengths, steps = (2048, 4096, 8000, 12000, 16000), []
    for tokens in lengths:
        kv = [tuple(torch.rand(1, HEADS, tokens, HEAD_DIM) for _ in range(2)) for _ in range(LAYERS)]
        steps.append(repeated(lambda kv=kv: attend(kv), 0.5).best)
        record("attention_seconds", steps[-1], "s", tokens=tokens)
    record("decode_slope_ratio", np.polyfit(lengths, steps, 1)[0] / (per_token / rate), "measured / bytes over bandwidth")
    for what, run in (("read", read), ("products", products)):  # of the last and longest
        record(f"decode_{what}_ratio", repeated(lambda run=run: run(kv), 0.5).best / (lengths[-1] * per_token / rate))
    net = model()
    machine, folder = temporary_machine(net)
    with folder:
        for tokens in (1024, 4096):
            visitor = machine.visitor(tokens, 1)
            machine.prefill(visitor)
            size = machine.size(tokens)

            def switch(visitor: Any = visitor) -> None:
                machine.swap_out(visitor)
                machine.swap_in(visitor)

            record("switch_bytes_per_second", 2 * size / repeated(switch, 0.5).best, "B/s", tokens=tokens)
    return records


def quadratic_law(record: Callable[..., None], head_dim: int) -> None:
    """Prefill's law and what its quadratic term is made of: products at the kernel's own shape, and one softmax a score."""
    net, seconds = model(head_dim), []

    def prefill(ids: torch.Tensor) -> None:
        net(ids, **with_cache(DynamicCache(config=net.config)), use_cache=True, logits_to_keep=1)

    for tokens in PREFILLS:
        ids = torch.randint(1, 512, (1, tokens))
        seconds.append(repeated(lambda ids=ids: prefill(ids), 0.5, 4).best)
        record("prefill_seconds", seconds[-1], "s", tokens=tokens, head_dim=head_dim)
    n, y = np.array(PREFILLS, dtype=float), np.array(seconds)
    terms = np.stack([np.ones_like(n), n, n**2], 1)
    fitted = np.linalg.lstsq(terms / y[:, None], np.ones_like(n), rcond=None)[0]  # relative errors: lengths count the same
    predicted = terms @ fitted
    record("prefill_r2", 1 - ((y - predicted) ** 2).sum() / ((y - y.mean()) ** 2).sum(), head_dim=head_dim)
    reached = peak(torch.float32).value
    record("peak", reached, "op/s", head_dim=head_dim)
    operations = 2 * LAYERS * HEADS * HEAD_DIM  # a causal layer's 4 n² d H, halved
    record("quadratic_ratio", fitted[2] / (operations / reached), "measured / 2 L H d n² at the peak", head_dim=head_dim)
    queries, keys, scores = torch.rand(BLOCK[0], head_dim), torch.rand(BLOCK[1], head_dim), torch.rand(BLOCK)
    ideal = 4 * scores.numel() * head_dim / reached
    both = repeated(lambda: (queries @ keys.T, scores @ keys)).best
    softmax = repeated(lambda: torch.softmax(scores, -1)).best
    record("products_ratio", both / ideal, "products of a block / their operations at the peak", head_dim=head_dim)
    record("softmax_ratio", softmax / ideal, "softmax of a block / the products' operations at the peak", head_dim=head_dim)


KV = list[tuple[torch.Tensor, ...]]


def attend(kv: KV) -> None:
    """What a decode step does with the caches of all layers: one query a head against every key and value."""
    query = torch.rand(1, HEADS, 1, HEAD_DIM)
    for keys, values in kv:
        torch.nn.functional.scaled_dot_product_attention(query, keys, values)


def products(kv: KV) -> None:
    """Its products alone."""
    query = torch.rand(1, HEADS, 1, HEAD_DIM)
    for keys, values in kv:
        (query @ keys.mT) @ values


def read(kv: KV) -> None:
    """The same bytes, once."""
    for keys, values in kv:
        torch.dot(keys.view(-1), values.view(-1))


def loop(shared: dict[str, Any], keep: float, counts: Sequence[int], seconds: float) -> list[Record]:
    net, records = model(), list[Record]()
    whole, folder = temporary_machine(net)
    with folder:
        room = FIT * whole.size(TOKENS)
    machine, folder = temporary_machine(net, keep, OwnClock())
    fit = room // machine.size(TOKENS)

    def record(method: str, metric: str, value: float, n: int = 1, unit: str = "", **setting: Any) -> None:
        setting = {"keep": keep, "fit": fit, "tokens": TOKENS, **setting}
        records.append(Record(method=method, metric=metric, value=value, n=n, unit=unit, setting=setting, **shared))

    with folder:
        service = machine.service(TOKENS, room)
        step, switch = service.step([TOKENS]), service.switch(TOKENS)
        record("calibrated", "step", step, unit="s")
        record("calibrated", "switch", switch, unit="s")
        print(f"keep {keep}: {step * 1e3:.2f} ms a step, {switch * 1e3:.2f} ms one way of a switch", flush=True)
        session = Session(TOKENS, 1_000_000, 1, fit / 2 * step)
        rates: dict[str, dict[int, float]] = {"measured": {}, "simulated": {}}
        for users in counts:
            real = run_loop(machine, session, users, CacheBudget(room), seconds + 0.6 * users)
            simulated = simulate(
                service, session, users, policy="lru", overlap=False, random_think=False, seconds=real.seconds
            )
            for method, report in (("measured", real), ("simulated", simulated)):
                rates[method][users] = report.steady_rounds_per_hour
                record(method, "rounds_per_hour", rates[method][users], report.rounds, users=users)
                record(method, "swaps_per_round", report.swaps / max(report.rounds, 1), report.rounds, users=users)
            told = [round(found[users]) for found in rates.values()]
            print(f"{users} users: measured {told[0]} simulated {told[1]} answers/h, {told[1] / told[0]:.3f}", flush=True)
    for method, found in rates.items():
        knee = max(users for users, rate in found.items() if rate >= 0.95 * max(found.values()))
        record(method, "knee", knee, unit="users")
        print(f"keep {keep}: knee of {method} at {knee} users, {fit} fit", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--parts", default=",".join(("laws", *LOOPS)))
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    parts = given.parts.split(",")
    if unknown := set(parts) - {"laws", *LOOPS}:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are laws, {', '.join(LOOPS)}")
    shared = {"paper": "long-context-peak", "device": "cpu", "time": now(), **provenance()}

    def part(record: Record) -> str:
        quarter = "-quarter" if record.setting.get("keep") == LOOPS["loop-quarter"][0] else ""
        return record.bench.removeprefix("long-context-peak-") + quarter

    kept = [one for one in read_json(given.out) if part(one) not in parts] if given.out.exists() else []
    with pinned(1):
        if "laws" in parts:
            kept += laws({**shared, "bench": "long-context-peak-laws"})
        for name in filter(parts.__contains__, LOOPS):
            kept += loop({**shared, "bench": "long-context-peak-loop"}, *LOOPS[name], given.seconds)
    write_results(kept, given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
