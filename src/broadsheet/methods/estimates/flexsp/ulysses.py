"""The executor: a plan really trained, by Ulysses' sequence parallelism over torch.distributed, for any transformers model.

Every rank of a group has a slice of the group's packed tokens. Before attention an all-to-all trades tokens for heads, so
that a rank has all tokens of some heads; after it another trades back. Attention runs sequence by sequence, each causal and
blind to the others. Groups are made when first needed, and kept.

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="ulysses")
    groups = Groups()                                                 # after torch.distributed.init_process_group
    loss = train_step(model, plan, [row["input_ids"] for row in batch], groups)
    optimiser.step()

The loss is averaged over the tokens of the *global* batch: were it averaged in each group, a token's weight would depend on
how many share its group, and the gradient on the plan. Ranks without a group in a micro-batch idle. `Groups.traffic` counts
bytes; a `Link` makes traffic between "nodes" slow, to show on one machine what a plan does for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .plans import Group, Plan


@dataclass(frozen=True)
class Link:
    """A simulated link: ranks are on nodes of ``node`` each, and what a rank sends to another node takes its bytes over
    ``bandwidth`` (MiB/ms) more."""

    node: int
    bandwidth: float


@dataclass
class Traffic:
    """Bytes of a rank: ``buffers`` of all-to-alls (what the cost model counts), of these ``sent`` to other ranks, of these
    ``crossing`` to other nodes; ``waited``: seconds spent on the simulated link."""

    buffers: int = 0
    sent: int = 0
    crossing: int = 0
    waited: float = 0.0


@dataclass
class Shard:
    """A rank's part of a group's tokens: what its all-to-alls need. ``bounds``: where the packed sequences end."""

    ranks: range
    process_group: Any
    bounds: tuple[int, ...]
    traffic: Traffic
    link: Link | None = None

    @property
    def degree(self) -> int:
        return len(self.ranks)

    def exchange(self, blocks: torch.Tensor) -> torch.Tensor:
        """Block i of [degree, ...] goes to the i-th rank of the group; what the others had for this one comes back."""
        if self.degree == 1:
            return blocks
        blocks = blocks.contiguous()  # gradients may come in any layout
        out = torch.empty_like(blocks)
        dist.all_to_all_single(out, blocks, group=self.process_group)
        size, mine = blocks.numel() * blocks.element_size(), dist.get_rank()
        self.traffic.buffers += size
        self.traffic.sent += size // self.degree * (self.degree - 1)
        if self.link:
            away = sum(rank // self.link.node != mine // self.link.node for rank in self.ranks)
            crossing = size // self.degree * away
            seconds = crossing / 2**20 / self.link.bandwidth / 1000
            self.traffic.crossing += crossing
            self.traffic.waited += seconds
            time.sleep(seconds)
        return out


class _Exchange(torch.autograd.Function):
    """`Shard.exchange`, whose gradient goes back the way it came: an all-to-all is its own transpose."""

    @staticmethod
    def forward(ctx: Any, blocks: torch.Tensor, shard: Shard) -> torch.Tensor:
        ctx.shard = shard
        return shard.exchange(blocks)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.shard.exchange(grads[0]), None


def to_heads(x: torch.Tensor, shard: Shard) -> torch.Tensor:
    """[tokens of this rank, heads, head_dim] -> [all tokens, heads of this rank, head_dim].

    Fewer heads than ranks (grouped-query keys and values) are repeated until each rank gets one.
    """
    degree = shard.degree
    if x.shape[1] < degree:
        x = x.repeat_interleave(degree // x.shape[1], 1)
    tokens, heads, dim = x.shape
    blocks = x.reshape(tokens, degree, heads // degree, dim).transpose(0, 1).contiguous()
    return _Exchange.apply(blocks, shard).reshape(degree * tokens, heads // degree, dim)


def to_tokens(x: torch.Tensor, shard: Shard) -> torch.Tensor:
    """The way back: [all tokens, heads of this rank, head_dim] -> [tokens of this rank, heads, head_dim]."""
    degree, (tokens, heads, dim) = shard.degree, x.shape
    blocks = _Exchange.apply(x.reshape(degree, tokens // degree, heads, dim).contiguous(), shard)
    return blocks.transpose(0, 1).reshape(tokens // degree, degree * heads, dim)


def ulysses_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    ulysses: Shard | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, heads, tokens, head_dim], keys and values with their own heads; the
    output is [1, tokens, heads, head_dim]. The model must be called with ``ulysses=`` a shard."""
    if ulysses is None:
        raise ValueError('a model with attention "ulysses" runs in train_step: it needs ulysses=Shard')
    q, k, v = (to_heads(x[0].transpose(0, 1), ulysses).transpose(0, 1)[None] for x in (query, key, value))
    parts, start = [], 0
    for end in ulysses.bounds:
        a, b, c = (x[:, :, start:end] for x in (q, k, v))
        one = F.scaled_dot_product_attention(a, b, c, None, dropout, is_causal=True, scale=scaling, enable_gqa=True)
        parts.append(one)
        start = end
    return to_tokens(torch.cat(parts, 2)[0].transpose(0, 1), ulysses)[None], None


ALL_ATTENTION_FUNCTIONS.register("ulysses", ulysses_attention)


@dataclass
class Groups:
    """Process groups, made when a plan first needs them, and this rank's traffic. Aligned groups of powers of two are fewer
    than twice the ranks."""

    link: Link | None = None
    traffic: Traffic = field(default_factory=Traffic)
    made: dict[range, Any] = field(default_factory=dict)

    def make(self, plan: Plan) -> None:
        """Those of a plan. Every rank calls this with the same plans: a process group is made by all ranks together (gloo
        hangs where only its members make it)."""
        for number in range(len(plan.micro_batches)):
            for ranks, _ in plan.ranks(number):
                if len(ranks) > 1 and ranks not in self.made:
                    self.made[ranks] = dist.new_group(list(ranks))

    def shard(self, ranks: range, bounds: Sequence[int]) -> Shard:
        return Shard(ranks, self.made.get(ranks), tuple(bounds), self.traffic, self.link)


@dataclass(frozen=True)
class Slice:
    """A rank's tokens of a packed group: ids, positions and labels [tokens], -100 where there is nothing to predict;
    ``bounds`` of the sequences in the whole pack."""

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    bounds: tuple[int, ...]


def pack(sequences: Sequence[Sequence[int]], degree: int, place: int) -> Slice:
    """The ``place``-th of ``degree`` equal slices of the sequences one after the other. Labels are shifted before slicing,
    as the next token may be another rank's. What a multiple of ``degree`` lacks is a last sequence without labels."""
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    bounds: list[int] = []
    for sequence in sequences:
        ids += sequence
        positions += range(len(sequence))
        labels += [*sequence[1:], -100]
        bounds.append(len(ids))
    if missing := -len(ids) % degree:
        ids, labels = ids + [0] * missing, labels + [-100] * missing
        positions += range(missing)
        bounds.append(len(ids))
    size = len(ids) // degree
    mine = slice(place * size, (place + 1) * size)
    return Slice(torch.tensor(ids[mine]), torch.tensor(positions[mine]), torch.tensor(labels[mine]), tuple(bounds))


def check_model(model: Any, plan: Plan) -> None:
    """Raises ValueError where the plan's degrees do not divide the model's heads."""
    config = model.config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if config._attn_implementation != "ulysses":
        raise ValueError('the model has other attention: load it with attn_implementation="ulysses"')
    for group in (group for groups in plan.micro_batches for group in groups):
        if config.num_attention_heads % group.degree or max(kv_heads, group.degree) % min(kv_heads, group.degree):
            raise ValueError(
                f"a group of {group.degree} cannot share {config.num_attention_heads} heads ({kv_heads} of keys/values): "
                "plan with a cost model that has the model's heads"
            )


def train_step(model: Any, plan: Plan, sequences: Sequence[Sequence[int]], groups: Groups) -> float:
    """Forward and backward of one global batch, on every rank: gradients are summed over all ranks into ``.grad``.

    ``sequences``: token ids, in the plan's order. Returns the loss, the mean over all predicted tokens of the batch.
    """
    check_model(model, plan)
    if [len(sequence) for sequence in sequences] != list(plan.problem.lengths):
        raise ValueError("the plan is for other sequences: their lengths differ")
    rank, device = dist.get_rank(), next(model.parameters()).device
    predicted = sum(len(sequence) - 1 for sequence in sequences)
    if not predicted:
        raise ValueError("no sequence has two tokens: there is nothing to predict")
    total = torch.zeros((), device=device)
    groups.make(plan)
    for number in range(len(plan.micro_batches)):
        for ranks, group in plan.ranks(number):
            if rank in ranks:
                loss = _group_loss(model, group, ranks, rank, sequences, groups, device) / predicted
                loss.backward()
                total += loss.detach()
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # an idle rank takes part in the sum all the same
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
    dist.all_reduce(total)
    return float(total)


def _group_loss(
    model: Any, group: Group, ranks: range, rank: int, sequences: Sequence[Sequence[int]], groups: Groups, device: Any
) -> torch.Tensor:
    """The summed loss of this rank's tokens."""
    part = pack([sequences[i] for i in group.sequences], group.degree, ranks.index(rank))
    shard = groups.shard(ranks, part.bounds)
    given = {"input_ids": part.ids[None].to(device), "position_ids": part.positions[None].to(device)}
    logits = model(**given, use_cache=False, ulysses=shard).logits[0]
    return F.cross_entropy(logits.float(), part.labels.to(device), ignore_index=-100, reduction="sum")


# --- a cluster of processes on this machine ---


def launch(ranks: int, work: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """``work(rank, *arguments)`` in ``ranks`` processes joined by gloo; what each returned. For tests and experiments: real
    runs start with torchrun. ``work`` must be a function of a module. Raises RuntimeError when one fails."""
    import multiprocessing
    from queue import Empty

    context = multiprocessing.get_context("forkserver")
    # imported once, not by every rank
    context.set_forkserver_preload([__name__, "transformers.models.llama.modeling_llama"])
    results = context.Queue()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = [(rank, ranks, store.port, timeout, results, work, arguments) for rank in range(ranks)]
    processes = [context.Process(target=_join, args=some, daemon=True) for some in given]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < ranks:
            rank, value, error = results.get(timeout=timeout)
            if error:
                raise RuntimeError(f"rank {rank} failed: {error}")
            found[rank] = value
    except Empty:
        raise RuntimeError(f"only {len(found)} of {ranks} ranks answered within {timeout:g} s") from None
    finally:
        for process in processes:
            process.join(5 if len(found) == ranks else 0)
            if process.is_alive():
                process.terminate()
    return [found[rank] for rank in range(ranks)]


def _join(rank: int, ranks: int, port: int, timeout: float, results: Any, work: Callable[..., Any], given: Any) -> None:
    from datetime import timedelta

    torch.set_num_threads(1)
    try:
        limit = timedelta(seconds=timeout)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
        results.put((rank, work(rank, *given), ""))
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:
        results.put((rank, None, f"{type(error).__name__}: {error}"))
