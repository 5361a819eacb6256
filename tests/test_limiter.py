"""The limiter keeps the asked ratio exactly, and never makes both sides wait."""

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldflux_dist.replay import Limiter

RATIOS = st.one_of(st.integers(1, 1024), st.floats(0.001, 64).map(lambda x: round(x, 3)))


@given(
    ratio=RATIOS,
    batch_steps=st.integers(1, 2048),
    prefill=st.integers(0, 2000),
    max_owed=st.integers(0, 100),
    requests=st.lists(st.tuples(st.integers(1, 600), st.integers(0, 9)), max_size=50),
)
def test_debt_is_exact_and_someone_may_always_go_on(
    ratio, batch_steps, prefill, max_owed, requests
):
    limiter = Limiter(ratio, batch_steps, prefill, max_owed)
    collected = trained = 0
    for num_steps, train in requests:
        assert limiter.owed > 0 or limiter.may_collect(num_steps)
        bound = max(max_owed, math.floor(num_steps * Fraction(str(ratio)) / batch_steps))
        assert limiter.may_collect(num_steps) == (limiter.owed <= bound)
        if limiter.may_collect(num_steps):
            limiter.inserted(num_steps)
            collected += num_steps
        for _ in range(min(train, limiter.owed)):
            limiter.sampled()
            trained += 1
        exact = collected * Fraction(str(ratio)) / batch_steps - trained
        assert limiter.owed == (math.floor(exact) if collected >= prefill else 0)
    assert (limiter.env_steps, limiter.gradient_steps) == (collected, trained)


@given(ratio=RATIOS, batch_steps=st.integers(1, 2048), chunks=st.lists(st.integers(1, 999)))
def test_a_learner_that_keeps_up_is_within_one_batch(ratio, batch_steps, chunks):
    limiter = Limiter(ratio, batch_steps, prefill=0)
    for num_steps in chunks:
        limiter.inserted(num_steps)
        limiter.sampled(limiter.owed)
        replayed = limiter.gradient_steps * batch_steps
        asked = limiter.env_steps * Fraction(str(ratio))
        assert 0 <= asked - replayed < batch_steps
        assert limiter.achieved == pytest.approx(replayed / limiter.env_steps)


def test_decimal_ratios_do_not_drift():
    limiter = Limiter(0.3, batch_steps=1, prefill=0)
    for _ in range(1000):
        limiter.inserted(1)
    assert limiter.owed == 300  # as a binary fraction 0.3 is a little less


def test_prefill_holds_the_learner_back_and_is_then_owed():
    limiter = Limiter(train_ratio=4, batch_steps=8, prefill=100, max_owed=10)
    limiter.inserted(99)
    assert limiter.owed == 0
    assert limiter.may_collect(1)
    assert limiter.achieved == 0
    limiter.inserted(1)
    assert limiter.owed == 50
    assert not limiter.may_collect(1)
    limiter.sampled(40)
    assert limiter.may_collect(1)
    with pytest.raises(RuntimeError, match="11 gradient steps taken but 10 owed"):
        limiter.sampled(11)


def test_one_request_may_be_under_way_while_the_last_is_worked_off():
    limiter = Limiter(train_ratio=512, batch_steps=1024, prefill=0, max_owed=4)
    limiter.inserted(512)
    assert limiter.owed == 256
    assert limiter.may_collect(512)
    assert not limiter.may_collect(8)
    limiter.inserted(512)
    assert not limiter.may_collect(512)


def test_saved_state_continues_exactly():
    limiter = Limiter(0.3, batch_steps=7, prefill=10)
    limiter.inserted(101)
    limiter.sampled(2)
    loaded = Limiter(0.3, batch_steps=7, prefill=10)
    loaded.load_state_dict(json.loads(json.dumps(limiter.state_dict())))
    for _ in range(50):
        for each in (limiter, loaded):
            each.inserted(3)
            each.sampled(each.owed)
        assert limiter.state_dict() == loaded.state_dict()


def test_resume_forgives_a_large_debt_and_keeps_the_fraction():
    limiter = Limiter(train_ratio=1, batch_steps=10, prefill=0)
    limiter.inserted(10_005)
    state = limiter.state_dict()
    changed = Limiter(train_ratio=100, batch_steps=10, prefill=0, max_owed=8)
    changed.load_state_dict(state)
    assert changed.owed == 8
    assert changed.forgiven == 992
    assert changed.env_steps == 10_005
    changed.sampled(8)
    changed.inserted(1)
    assert changed.state_dict()["debt"] == "21/2"


def test_resume_with_a_lower_ratio_does_not_stall_the_learner():
    limiter = Limiter(train_ratio=100, batch_steps=10, prefill=0)
    limiter.inserted(1000)
    limiter.sampled(limiter.owed)
    lower = Limiter(train_ratio=1, batch_steps=10, prefill=0)
    lower.load_state_dict(limiter.state_dict())
    lower.inserted(10)
    assert lower.owed == 1


@pytest.mark.parametrize(
    "numbers", [(-1.0, 8, 0), (math.nan, 8, 0), (math.inf, 8, 0), (1.0, 0, 0), (1.0, 8, -1)]
)
def test_impossible_numbers_are_refused(numbers):
    with pytest.raises(ValueError, match=r"must be at least 1|give a finite number"):
        Limiter(*numbers)
