"""The shapes of the schedules, against torch's learning-rate schedulers, the papers' formulas and sums by hand."""

import copy
import itertools
import math
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_pathloss import ArgumentError, ConstructionError, schedules
from torch_pathloss.schedules import (
    alternate,
    by_epoch,
    constant,
    cosine,
    cyclical,
    exponential,
    linear,
    one_cycle,
    piecewise,
    value_at,
)

LR = torch.optim.lr_scheduler


def rates(scheduler, steps, base=1.0):
    """Returns what a scheduler of torch sets, from step 0 on."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base)
    following = scheduler(optimizer)
    found = []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if len(found) < steps:
            following.step()
    return found


def weights(schedule, steps):
    return [schedule(step) for step in range(steps)]


TORCH = {
    "linear": (linear(0.5, 2.0, steps=8), lambda o: LR.LinearLR(o, 0.25, 1.0, total_iters=8), 2.0, 12),
    "linear down": (linear(3.0, 0.75, steps=5), lambda o: LR.LinearLR(o, 1.0, 0.25, total_iters=5), 3.0, 8),
    "cosine": (cosine(2.0, 0.5, steps=9), lambda o: LR.CosineAnnealingLR(o, T_max=9, eta_min=0.5), 2.0, 10),
    "exponential": (
        exponential(2.0, 2.0 * 0.9**7, steps=7),
        lambda o: LR.ExponentialLR(o, gamma=0.9),
        2.0,
        8,
    ),
    "one_cycle": (
        one_cycle(3.0, 20),
        lambda o: LR.OneCycleLR(o, max_lr=3.0, total_steps=20, cycle_momentum=False),
        3.0,
        20,
    ),
    "one_cycle with other options": (
        one_cycle(1.0, 11, ratio=0.45, start=0.2, end=0.05),
        lambda o: LR.OneCycleLR(
            o, 1.0, total_steps=11, pct_start=0.45, div_factor=5.0, final_div_factor=4.0, cycle_momentum=False
        ),
        1.0,
        11,
    ),
    "piecewise": (
        piecewise({0: 1.0, 3: 0.5, 7: 0.25}),
        lambda o: LR.MultiStepLR(o, milestones=[3, 7], gamma=0.5),
        1.0,
        10,
    ),
    "piecewise of schedules": (
        piecewise({0: linear(0.25, 1.0, steps=4), 4: cosine(1.0, 0.0, steps=6)}),
        lambda o: LR.SequentialLR(
            o, [LR.LinearLR(o, 0.25, 1.0, total_iters=4), LR.CosineAnnealingLR(o, T_max=6)], milestones=[4]
        ),
        1.0,
        10,
    ),
    "by_epoch": (
        by_epoch(exponential(1.0, 0.5**4, steps=4), steps_per_epoch=3),
        lambda o: LR.StepLR(o, step_size=3, gamma=0.5),
        1.0,
        15,
    ),
    "product": (
        0.5 * linear(0.5, 1.0, steps=4) * exponential(1.0, 0.9**20, steps=20),
        lambda o: LR.ChainedScheduler([LR.LinearLR(o, 0.5, 1.0, total_iters=4), LR.ExponentialLR(o, 0.9)]),
        0.5,
        20,
    ),
    "product with a function": (
        linear(0.0, 1.0, steps=5) * (lambda step: 1 / (1 + step)),
        lambda o: LR.LambdaLR(o, lambda step: min(1.0, step / 5) / (1 + step)),
        1.0,
        9,
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_where_torch_has_the_same_scheduler_the_weights_are_its_rates(name):
    schedule, scheduler, base, steps = TORCH[name]
    assert weights(schedule, steps) == pytest.approx(rates(scheduler, steps, base), rel=1e-9, abs=1e-12)


def test_a_sum_adds_up_and_a_schedule_that_begins_later_waits():
    schedule = linear(0.0, 1.0, steps=2, begin=1) + 0.5 * constant(4.0) + (lambda step: step**2)
    assert weights(schedule, 5) == [0 + 2 + 0, 0 + 2 + 1, 0.5 + 2 + 4, 1 + 2 + 9, 1 + 2 + 16]
    assert weights(exponential(-8.0, -1.0, steps=3, begin=2), 7) == pytest.approx([-8, -8, -8, -4, -2, -1, -1])
    assert weights(cosine(0.0, 1.0, steps=2, begin=1), 5) == pytest.approx([0, 0, 0.5, 1, 1])


def paper(t, steps, cycles, ratio):
    """Fu et al. 2019, equations 6 and 7 with the linear f, exactly. The paper's step counts from 1."""
    tau = Fraction((t - 1) % math.ceil(Fraction(steps, cycles)), 1) / Fraction(steps, cycles)
    return tau / ratio if tau <= ratio else Fraction(1)


@pytest.mark.parametrize(
    ("steps", "cycles", "ratio"), [(40, 4, Fraction(1, 2)), (10, 4, Fraction(1, 2)), (100, 3, Fraction(1, 4))]
)
def test_cyclical_is_the_formula_of_the_paper(steps, cycles, ratio):
    expected = [float(paper(t, steps, cycles, ratio)) for t in range(1, steps + 1)]
    assert weights(cyclical(steps, cycles=cycles, ratio=float(ratio)), steps) == pytest.approx(expected, abs=1e-12)


def test_a_cycle_rises_in_equal_parts_and_stays_and_so_does_the_next():
    rise, stay = [0.0, 0.25, 0.5, 0.75], [1.0] * 4  # the annealing of the authors' code: 4 of 8 steps, n = 16, M = 2
    assert weights(cyclical(16, cycles=2), 20) == [*rise, *stay, *rise, *stay, *[1.0] * 4]
    shifted = [2.0 + 6.0 * part for part in (*rise, *stay, *rise, *stay, *[1.0] * 4)]
    assert weights(cyclical(16, cycles=2, start=2.0, end=8.0), 20) == shifted
    one_cycle_is_monotonic = weights(cyclical(16, cycles=1), 16)
    assert one_cycle_is_monotonic == [min(1.0, step / 8) for step in range(16)]


def test_cyclical_along_a_cosine():
    found = weights(cyclical(8, cycles=2, ratio=1.0, shape="cosine"), 8)
    wave = [0.0, (1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2]  # at 0, 45, 90 and 135 degrees
    assert found == pytest.approx([*wave, *wave])


def test_alternation_gives_each_phase_its_steps_in_turn():
    phases = [alternate(2, 1, 3, phase=phase) for phase in range(3)]
    active = [[phase.is_active(step) for phase in phases].index(True) for step in range(12)]
    assert active == [0, 0, 1, 2, 2, 2] * 2
    assert all(sum(phase.is_active(step) for phase in phases) == 1 for step in range(12))
    assert [weights(phase, 6) for phase in phases] == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]


def test_activity_goes_through_products_sums_pieces_and_epochs():
    even, third = alternate(1, 1), alternate(1, 2)

    def active(schedule, steps=6):
        return [step for step in range(steps) if schedule.is_active(step)]

    assert active(even * third) == [0]  # even and divisible by 3
    assert active(even + third) == [0, 2, 3, 4]
    assert active(even * 5.0) == active(5.0 * even) == [0, 2, 4]
    assert active(even + 5.0) == [0, 1, 2, 3, 4, 5]
    assert active(linear(0.0, 0.0, steps=1)) == [0, 1, 2, 3, 4, 5]  # a weight of 0 is computed
    assert active(piecewise({0: even, 3: even})) == [0, 2, 3, 5]
    assert active(by_epoch(even, steps_per_epoch=2)) == [0, 1, 4, 5]
    assert active(by_epoch(lambda epoch: 1.0, steps_per_epoch=2)) == [0, 1, 2, 3, 4, 5]
    quiet = alternate(1, 1, set_to_none=True)
    for schedule in (quiet * even, even * quiet, quiet + even, piecewise({0: 1.0, 2: quiet}), by_epoch(quiet, 2)):
        assert schedule.set_to_none
    assert not (even * third).set_to_none


PRINTED = [
    "linear(0.0, 1.0, steps=4)",
    "cosine(2.0, 0.5, steps=4, begin=3)",
    "exponential(1.0, 0.01, steps=7)",
    "piecewise({0: 1.0, 3: linear(0.0, 1.0, steps=2)})",
    "cyclical(10, cycles=2, ratio=0.25, start=0.0, end=1.0, shape='cosine')",
    "one_cycle(3.0, steps=10, ratio=0.3, start=0.12, end=0.01)",
    "alternate(2, 1, phase=1, set_to_none=True)",
    "by_epoch(linear(0.0, 1.0, steps=2), steps_per_epoch=3)",
    "0.5 * linear(0.0, 1.0, steps=4) * alternate(1, 2)",
    "(linear(0.0, 1.0, steps=4) + 1.0) * cosine(1.0, 0.0, steps=3)",
]


@pytest.mark.parametrize("text", PRINTED)
def test_a_schedule_prints_as_it_was_written_and_is_compared_copied_and_pickled_by_value(text):
    schedule = eval(text, vars(schedules))
    assert repr(schedule) == text
    for other in (eval(repr(schedule), vars(schedules)), copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert other == schedule
        assert weights(other, 20) == weights(schedule, 20)


def test_a_function_prints_with_its_name():
    def warm(step):
        return 1.0

    assert repr(2.0 * (linear(0.0, 1.0, steps=2) + warm)) == "2.0 * (linear(0.0, 1.0, steps=2) + warm)"


finite = st.floats(-1e3, 1e3)
counts = st.integers(1, 50)


@given(finite, finite, counts, st.integers(0, 20), st.sampled_from([linear, cosine]))
def test_a_ramp_starts_ends_and_stays_between(start, end, steps, begin, ramp):
    schedule = ramp(start, end, steps=steps, begin=begin)
    found = weights(schedule, begin + steps + 5)
    assert found[: begin + 1] == pytest.approx([start] * (begin + 1))
    assert found[begin + steps :] == pytest.approx([end] * 5)
    low, high = min(start, end), max(start, end)
    assert all(low - 1e-9 <= weight <= high + 1e-9 for weight in found)
    moves = [b - a for a, b in itertools.pairwise(found)]
    assert all(move * (end - start) >= -1e-9 for move in moves)


@given(counts, st.integers(1, 8), st.floats(0.05, 1.0))
def test_cyclical_stays_between_and_ends_at_the_end(steps, cycles, ratio):
    if cycles > steps:
        return
    schedule = cyclical(steps, cycles=cycles, ratio=ratio)
    assert all(0 <= weight <= 1 for weight in weights(schedule, steps + 5))
    assert weights(schedule, steps + 5)[steps:] == [1.0] * 5
    assert schedule(0) == 0.0


ERRORS = {
    "start must be a finite number, not inf of type float.": lambda: linear(math.inf, 1.0, steps=2),
    "end must be a finite number, not '1' of type str.": lambda: cosine(0.0, "1", steps=2),
    "steps must be a whole number of at least 1, not 0 of type int.": lambda: linear(0.0, 1.0, steps=0),
    "steps must be a whole number of at least 1, not 2.0 of type float.": lambda: linear(0.0, 1.0, steps=2.0),
    "begin must be a whole number of at least 0, not -1 of type int.": lambda: linear(0.0, 1.0, steps=2, begin=-1),
    "value must be a finite number, not True of type bool.": lambda: constant(True),
    "exponential cannot reach 0.0 from 1.0: both must be positive, or negative.": lambda: exponential(1.0, 0.0, 2),
    "exponential cannot reach -1.0 from 1.0: both must be positive, or negative.": lambda: exponential(1.0, -1.0, 2),
    "piecewise needs a piece that begins at step 0; there are pieces at [2, 5].": lambda: piecewise({5: 1.0, 2: 2.0}),
    "piecewise needs a piece that begins at step 0; there are pieces at [].": lambda: piecewise({}),
    "the step of a piece must be a whole number of at least 0, not 'x' of type str.": lambda: piecewise({"x": 1.0}),
    "None of type NoneType cannot be a piece of a schedule: it is neither a finite number nor a function "
    "step -> float.": lambda: piecewise({0: None}),
    "ratio must be above 0 and at most 1, not 0.0.": lambda: cyclical(10, ratio=0.0),
    "shape must be 'linear' or 'cosine', not 'sigmoid'.": lambda: cyclical(10, shape="sigmoid"),
    "4 cycles do not fit into 3 steps.": lambda: cyclical(3),
    "ratio times steps must be above 1 and below steps, but 0.3 times 3 is 0.9.": lambda: one_cycle(1.0, 3),
    "alternate needs the steps of two phases or more, as in alternate(100, 50), but was given (5,).": (
        lambda: alternate(5)
    ),
    "the steps of a phase must be a whole number of at least 1, not 0 of type int.": lambda: alternate(5, 0),
    "phase must be one of 0, 1, not 2.": lambda: alternate(5, 5, phase=2),
    "steps_per_epoch must be a whole number of at least 1, not 0 of type int.": lambda: by_epoch(constant(1.0), 0),
    "'x' of type str cannot be multiplied by: it is neither a finite number nor a function step -> float.": (
        lambda: constant(1.0) * "x"
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_a_schedule_that_cannot_be_built_says_why(message):
    with pytest.raises(ConstructionError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message


def test_a_function_that_gives_no_finite_number_says_at_which_step():
    def broken(step):
        return "1" if step == 3 else 1.0

    assert value_at(2.0 * constant(1.0) * broken, 2) == 2.0
    with pytest.raises(ArgumentError) as caught:
        value_at(constant(1.0) * broken, 3)
    assert str(caught.value) == ("the schedule broken gave '1' of type str at step 3. It must give a finite number.")
