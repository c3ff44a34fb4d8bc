"""Two-stage checkpoints: whole or nothing, whatever happens."""

import os
import signal
import threading

import pytest
import torch

from broadsheet.methods.estimates.megascale.checkpoint import Checkpointer, damage, last_good, partition, shards_of, steps_of

STATE = {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.tensor([1.5])}


def save_all(folder, step, world=2, attempt=0, **kwargs):
    for rank in range(world):
        one = Checkpointer(folder, rank, world, attempt, background=False, **kwargs)
        one.save(step, STATE, {"random": torch.tensor([rank])}, {"step": step})


def test_partition_is_balanced_and_equal_for_all():
    sizes = {"a": 10, "b": 6, "c": 5, "d": 5}
    owner = partition(sizes, 2)
    assert owner == partition(dict(reversed(sizes.items())), 2)
    loads = [sum(sizes[name] for name, part in owner.items() if part == which) for which in (0, 1)]
    assert max(loads) - min(loads) <= min(sizes.values())


def test_round_trip_of_one_rank(tmp_path):
    one = Checkpointer(tmp_path)
    one.save(7, STATE, {"random": torch.tensor([3])}, {"position": 28})
    one.wait()
    found = Checkpointer(tmp_path).restore()
    assert found.step == 7
    assert found.facts == {"position": 28}
    assert torch.equal(found.shared["weight"], STATE["weight"])
    assert torch.equal(found.own["random"], torch.tensor([3]))


def test_nothing_to_restore(tmp_path):
    assert Checkpointer(tmp_path / "none").restore() is None


def test_training_may_change_tensors_while_stage_two_writes(tmp_path):
    state, go = {"weight": torch.ones(1000)}, threading.Event()
    one = Checkpointer(tmp_path, midway=lambda step: go.wait(10))
    one.save(1, state, {}, {})
    state["weight"].zero_()  # the next step of training
    go.set()
    one.wait()
    assert Checkpointer(tmp_path).restore().shared["weight"].sum() == 1000


def test_a_flipped_bit_sends_the_reader_to_the_one_before(tmp_path):
    save_all(tmp_path, 10)
    save_all(tmp_path, 20)
    path = shards_of(tmp_path, 20)[1]
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes(raw)
    assert "shard 1" in damage(tmp_path, 20)
    assert last_good(tmp_path) == (10, ["checkpoint 20: shard 1 does not match its checksum"])


def test_a_missing_shard_is_no_checkpoint(tmp_path):
    save_all(tmp_path, 10)
    Checkpointer(tmp_path, 0, 2, background=False).save(20, STATE, {}, {})
    assert last_good(tmp_path)[0] == 10


def test_shards_of_two_attempts_are_not_mixed(tmp_path):
    Checkpointer(tmp_path, 0, 2, attempt=0, background=False).save(20, STATE, {}, {})
    Checkpointer(tmp_path, 1, 2, attempt=1, background=False).save(20, STATE, {}, {})
    assert shards_of(tmp_path, 20) is None


def test_old_ones_go_only_when_newer_ones_are_complete(tmp_path):
    for step in (10, 20, 30):
        save_all(tmp_path, step)
    Checkpointer(tmp_path, 0, 2, background=False).save(40, STATE, {}, {})  # rank 1 never writes its part
    good = [step for step in steps_of(tmp_path) if not damage(tmp_path, step)]
    assert good[:2] == [30, 20]


def test_kill_in_the_middle_of_stage_two_leaves_the_last_good(tmp_path):
    Checkpointer(tmp_path, background=False).save(10, STATE, {}, {})
    pid = os.fork()
    if pid == 0:
        one = Checkpointer(tmp_path, midway=lambda step: os.kill(os.getpid(), signal.SIGKILL))
        one.save(20, STATE, {}, {})
        one.wait()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert list((tmp_path / "step-000020").iterdir()), "the kill came before a byte was written"
    found = Checkpointer(tmp_path).restore()
    assert found.step == 10
    assert torch.equal(found.shared["weight"], STATE["weight"])


def test_a_full_disk_is_told_and_costs_nothing_that_was_there(tmp_path):
    def full(step):
        raise OSError(28, "No space left on device")

    Checkpointer(tmp_path, background=False).save(10, STATE, {}, {})
    one = Checkpointer(tmp_path, midway=full)
    one.save(20, STATE, {}, {})
    one.wait()
    assert one.error.errno == 28
    assert last_good(tmp_path)[0] == 10
    assert not list((tmp_path / "step-000020").iterdir()), "a half-written file stayed"
    with pytest.raises(OSError, match="No space"):
        Checkpointer(tmp_path, background=False, midway=full).save(20, STATE, {}, {})


def test_another_number_of_ranks_is_refused(tmp_path):
    save_all(tmp_path, 10, world=2)
    with pytest.raises(ValueError, match="of 2 ranks, this run has 1"):
        Checkpointer(tmp_path).restore()


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        Checkpointer(tmp_path, keep=0)
