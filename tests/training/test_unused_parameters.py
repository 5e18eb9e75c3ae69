"""Parameters without a gradient: DDP searches for them only where a training says that there may be some."""

import pytest
from rows import Line, Rows, Seen, train
from torch import nn

from ldm.errors import UserError
from ldm.training.parallel import destroy_process_group


class Spare(Line):
    """A line beside a parameter that the loss does not depend on."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(1, 1, bias=False)


@pytest.fixture(autouse=True)
def group_ends():
    yield
    destroy_process_group()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_unexpected_unused_parameter_is_named(accumulate):
    lit = Spare()
    lit.has_unused_parameters = False
    with pytest.raises(
        UserError, match=r"the loss does not depend on spare\.weight in this step; set has_unused_parameters = True"
    ):
        train(lit, Rows(), [], steps=2, strategy="ddp", accumulate_grad_batches=accumulate)


@pytest.mark.parametrize("unused", [True, None])
def test_expected_unused_parameter_is_accepted(unused):
    """Nor where a training says nothing, as one of your own."""
    lit, after, alone = Spare(), Seen(), Seen()
    if unused is not None:
        lit.has_unused_parameters = unused
    train(lit, Rows(), [after], steps=3, strategy="ddp")
    destroy_process_group()
    train(Line(), Rows(), [alone], steps=3)
    assert after.weights == alone.weights


@pytest.mark.parametrize("unused", [True, False])
def test_ddp_searches_unused_parameters_only_when_declared(unused):
    lit, searched = Spare() if unused else Line(), []
    lit.has_unused_parameters = unused
    look = Seen()
    look.on_train_start = lambda trainer, lit: searched.append(trainer.strategy.model.find_unused_parameters)
    train(lit, Rows(), [look], steps=1, strategy="ddp")
    assert searched == [unused]
