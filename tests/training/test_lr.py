import math

import pytest

from ldm.training.lr import constant, cosine


@pytest.mark.parametrize("schedule", [constant, cosine])
def test_warmup_is_linear_and_first_step_nonzero(schedule):
    rates = [schedule(step, 100_000, warmup=4) for step in range(6)]
    for got, expected in zip(rates, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0], strict=True):
        assert math.isclose(got, expected, rel_tol=1e-6)


@pytest.mark.parametrize("schedule", [constant, cosine])
def test_schedule_without_warmup_starts_at_one(schedule):
    assert schedule(0, 10) == 1


def test_cosine_reaches_end_and_middle():
    assert math.isclose(cosine(50, 100), 0.5)
    assert math.isclose(cosine(25, 100), 0.5 + 0.25 * math.sqrt(2))
    assert math.isclose(cosine(100, 100, end=0.1), 0.1)
    assert math.isclose(cosine(50, 100, end=0.1), 0.55)
    assert math.isclose(cosine(500, 100, end=0.1), 0.1)
