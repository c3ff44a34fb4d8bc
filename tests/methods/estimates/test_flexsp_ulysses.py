"""The executor on gloo: loss, gradients and bytes of plans with groups of several sizes, beside one process."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from broadsheet.methods.estimates.flexsp import Group, Plan, Problem, SPCostModel
from broadsheet.methods.estimates.flexsp.ulysses import Groups, Link, launch, pack, train_step

RANKS, LAYERS, HIDDEN, HEADS = 8, 2, 64, 8
#: lengths that need padding in wide groups, and one that is alone on a device
LENGTHS = (61, 40, 33, 18, 9, 16, 7, 5, 24, 2)
#: two micro-batches: groups of 4, 2, 1, 1, then of 8; after it one where devices idle
HETEROGENEOUS = (
    (Group(4, (0, 2)), Group(2, (1,)), Group(1, (4, 7)), Group(1, (6,))),
    (Group(8, (8, 3)),),
    (Group(2, (5, 9)),),
)


def tiny(kv_heads, attention="ulysses"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=kv_heads, max_position_embeddings=256, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def sequences():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 97, length).tolist() for length in LENGTHS]


def plan_of(micro_batches, kv_heads=HEADS, lengths=LENGTHS):
    cost = replace(
        SPCostModel.from_preset("gpt-7b-a100"), layers=LAYERS, hidden=HIDDEN, heads=HEADS, kv_heads=kv_heads, itemsize=4
    )
    plan = Plan(Problem(lengths, RANKS, 256, (1, 2, 4, 8), cost), micro_batches, "by hand")
    plan.check()
    return plan


def alone(kv_heads):
    """One process, one sequence at a time, with transformers' own attention."""
    model = tiny(kv_heads, "sdpa")
    predicted = sum(length - 1 for length in LENGTHS)
    total = 0.0
    for ids in map(torch.tensor, sequences()):
        loss = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum") / predicted
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in model.named_parameters()}


def step(rank, micro_batches, kv_heads, link=None):
    """What every rank does: its loss, largest difference of a gradient from ours, bytes, and how many groups it made."""
    model, plan, groups = tiny(kv_heads), plan_of(micro_batches, kv_heads), Groups(link)
    loss = train_step(model, plan, sequences(), groups)
    _, wanted = alone(kv_heads)
    errors = [float((p.grad - wanted[name]).abs().max()) for name, p in model.named_parameters()]
    again = len(groups.made)
    train_step(model, plan, sequences(), groups)
    return loss, max(errors), groups.traffic, again == len(groups.made)


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_check9_groups_of_several_sizes_train_as_one_process_does(kv_heads):
    found = launch(RANKS, step, HETEROGENEOUS, kv_heads)
    loss, gradients = alone(kv_heads)
    assert max(float(g.abs().max()) for g in gradients.values()) > 0.01  # 1e-5 means something
    for ours, error, _, kept in found:
        assert ours == pytest.approx(loss, abs=1e-6)
        assert error < 1e-5
        assert kept  # groups of the first step serve the second
    plan = plan_of(HETEROGENEOUS, kv_heads)
    for rank, (_, _, traffic, _) in enumerate(found):
        buffers = sent = 0.0
        for number in range(len(plan.micro_batches)):
            for ranks, group in plan.ranks(number):
                if rank in ranks and group.degree > 1:
                    tokens = sum(LENGTHS[i] for i in group.sequences)
                    tokens += -tokens % group.degree
                    size = plan.problem.cost.volume(tokens, group.degree) * 2**20
                    buffers, sent = buffers + size, sent + size * (group.degree - 1) / group.degree
        assert traffic.buffers == 2 * buffers  # of two steps
        assert traffic.sent == 2 * sent
        assert traffic.crossing == 0


def slow_step(rank, micro_batches):
    groups = Groups(Link(node=4, bandwidth=10.0))
    train_step(tiny(HEADS), plan_of(micro_batches), sequences(), groups)
    return groups.traffic


def test_only_groups_wider_than_a_node_cross_the_simulated_link():
    inside = launch(RANKS, slow_step, (HETEROGENEOUS[0], (Group(4, (8, 3)), Group(4, (5, 9)))))
    assert {traffic.crossing for traffic in inside} == {0}
    across = launch(RANKS, slow_step, ((Group(8, tuple(range(10))),),))
    for traffic in across:
        assert traffic.crossing == traffic.buffers / 2  # four of eight ranks are on the other node
        assert traffic.waited == pytest.approx(traffic.crossing / 2**20 / 10 / 1000)


def failing(rank):
    if rank == 1:
        raise ValueError("on purpose")
    dist.barrier()


def test_a_rank_that_fails_is_named():
    with pytest.raises(RuntimeError, match="rank 1 failed: ValueError: on purpose"):
        launch(2, failing, timeout=20)


def test_packing_shifts_labels_before_it_slices():
    parts = [pack([[5, 6, 7], [8, 9]], 4, place) for place in range(4)]
    assert torch.cat([part.ids for part in parts]).tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert torch.cat([part.labels for part in parts]).tolist() == [6, 7, -100, 9, -100, -100, -100, -100]
    assert torch.cat([part.positions for part in parts]).tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert parts[0].bounds == (3, 5, 8)


def bad(rank, kind):
    plan, model, ids = plan_of(((Group(1, tuple(range(10))),),)), tiny(HEADS), sequences()
    if kind == "attention":
        model = tiny(HEADS, "sdpa")
    elif kind == "lengths":
        ids[0] = ids[0][:-1]
    elif kind == "heads":
        plan = plan_of(((Group(8, tuple(range(10))),),))
        model.config.num_attention_heads = 4
    elif kind == "nothing":
        plan = plan_of(((Group(1, (0, 1)),),), lengths=(1, 1))
        ids = [[3], [4]]
    try:
        train_step(model, plan, ids, Groups())
    except ValueError as error:
        return str(error)
    return ""


def test_bad_input_is_one_line_that_says_what_to_do():
    for kind, message in {
        "attention": 'attn_implementation="ulysses"',
        "lengths": "their lengths differ",
        "heads": "a group of 8 cannot share 4 heads",
        "nothing": "nothing to predict",
    }.items():
        assert message in launch(1, bad, kind)[0]
    with pytest.raises(ValueError, match="train_step"):
        tiny(HEADS)(torch.tensor([[1, 2]]))
