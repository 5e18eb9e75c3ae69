"""Collectives over several processes and in one, and the checks across ranks, with a process group in memory."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ldm.errors import UserError
from ldm.training import parallel
from ldm.training.parallel import EveryGradient, RankConsistencyCheck


class Group:
    """This process is rank 0; the values of the other ranks are prepared."""

    def __init__(self, monkeypatch, others):
        self.others = others
        for name, value in {
            "is_initialized": lambda: True,
            "get_world_size": lambda: 1 + len(self.others),
            "get_backend": lambda: "gloo",
            "all_reduce": self.all_reduce,
            "all_gather_object": self.all_gather_object,
        }.items():
            monkeypatch.setattr(dist, name, value)

    def all_reduce(self, x, op=dist.ReduceOp.SUM):
        for other in self.others:
            x.copy_(torch.maximum(x, other) if op == dist.ReduceOp.MAX else x + other)

    def all_gather_object(self, values, value):
        assert len(values) == 1 + len(self.others)
        values[:] = [value, *self.others]


def test_collectives_of_one_process_are_identities():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    for reduce in (parallel.all_reduce_mean, parallel.all_reduce_sum):
        assert torch.equal(reduce(x), x)
        assert not reduce(x).requires_grad
    assert parallel.all_reduce_max(x) is x
    assert parallel.all_gather_objects("a") == ["a"]
    assert parallel.chief_decides(True, torch.device("cpu")) is True
    assert parallel.chief_decides(False, torch.device("cpu")) is False
    assert parallel.is_single_process()


def test_group_of_one_process_is_single(monkeypatch):
    Group(monkeypatch, [])
    assert parallel.is_single_process()
    Group(monkeypatch, [0])
    assert not parallel.is_single_process()
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    assert parallel.is_single_process()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "is_available", lambda: False)
    assert parallel.is_single_process()


def test_collectives_reduce_over_ranks_and_leave_their_argument(monkeypatch):
    Group(monkeypatch, [torch.tensor([3.0, -8.0]), torch.tensor([5.0, 0.0])])
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert parallel.all_reduce_mean(x).tolist() == [3.0, -2.0]
    assert parallel.all_reduce_sum(x).tolist() == [9.0, -6.0]
    assert parallel.all_reduce_max(x.detach()).tolist() == [5.0, 2.0]
    assert x.tolist() == [1.0, 2.0]
    assert not parallel.all_reduce_mean(x).requires_grad
    assert not parallel.all_reduce_sum(x).requires_grad


def test_objects_are_gathered_in_order_of_ranks(monkeypatch):
    Group(monkeypatch, ["b", "c"])
    assert parallel.all_gather_objects("a") == ["a", "b", "c"]


@pytest.mark.parametrize("flag", [False, True])
def test_first_process_decides_for_all(flag, monkeypatch):
    Group(monkeypatch, [torch.tensor(0)])
    assert parallel.chief_decides(flag, torch.device("cpu")) is flag
    Group(monkeypatch, [torch.tensor(int(flag))])  # this process is another one
    assert parallel.chief_decides(False, torch.device("cpu")) is flag


def test_process_group_is_destroyed_if_there_is_one(monkeypatch):
    ended = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append(True))
    parallel.destroy_process_group()
    assert not ended
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    parallel.destroy_process_group()
    assert ended == [True]
    monkeypatch.setattr(dist, "is_available", lambda: False)
    parallel.destroy_process_group()
    assert ended == [True]


def test_every_gradient_names_parameters_without_gradient():
    net = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in "abcde"})
    check = EveryGradient().on_before_optimizer_step
    for name, layer in net.items():
        layer.weight.requires_grad_(name != "e")
        layer.weight.grad = torch.zeros(1, 1) if name == "a" else None
    with pytest.raises(UserError, match=r"depend on b\.weight, c\.weight, d\.weight in this step"):
        check(None, net, None)
    net["f"] = nn.Linear(1, 1, bias=False)
    with pytest.raises(UserError, match=r"depend on b\.weight, c\.weight, d\.weight, \.\.\. in this step"):
        check(None, net, None)
    for layer in net.values():
        layer.weight.grad = torch.zeros(1, 1)
    net["e"].weight.grad = None  # frozen
    check(None, net, None)


def trainer(world_size):
    return SimpleNamespace(world_size=world_size, global_rank=0)


@pytest.fixture
def _no_world(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.usefixtures("_no_world")
def test_ranks_that_differ_are_refused(monkeypatch):
    check = RankConsistencyCheck({"seed": 1})
    Group(monkeypatch, [{"number of processes": "2", "seed": 1}])
    check.on_fit_start(trainer(2), None)
    Group(monkeypatch, [{"number of processes": "2", "seed": 2}])
    with pytest.raises(UserError, match=r"ranks 0 and 1 differ in the seed \(1, 2\)"):
        check.on_fit_start(trainer(2), None)


@pytest.mark.usefixtures("_no_world")
def test_trainer_for_more_processes_than_run_is_refused(monkeypatch):
    check = RankConsistencyCheck({})
    check.on_fit_start(trainer(1), None)
    with pytest.raises(UserError, match="for 2 processes, but 1 are running"):
        check.on_fit_start(trainer(2), None)
    Group(monkeypatch, [{"number of processes": "1"}])
    with pytest.raises(UserError, match="for 1 processes, but 2 are running"):
        check.on_fit_start(trainer(1), None)
