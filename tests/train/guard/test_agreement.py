"""Which rank is slow. What ranks agree on in a run: test_stop.py and test_hangs.py, a folder above."""

from train.config_sections import TimeoutConfig
from train.guard.agreement import IN_A_ROW, Agreement, patience


def slow(rounds: list[list[float]]) -> list[list]:
    """What each of these sums of the ranks' own seconds finds."""
    agreement = Agreement.__new__(Agreement)  # without a process group
    agreement._late = [0] * len(rounds[0])
    return [agreement._slow(seconds) for seconds in rounds]


def test_a_rank_is_slow_above_twice_the_median_five_times_in_a_row_and_named_once():
    late = [0.1, 0.21, 0.1, 0.11]
    assert IN_A_ROW == 5
    assert slow([late] * 12) == [[]] * 4 + [[(1, 0.21, 0.1)]] + [[]] * 7
    fine = [0.1, 0.19, 0.1, 0.11]
    assert slow([late] * 4 + [fine] + [late] * 5) == [[]] * 9 + [[(1, 0.21, 0.1)]]  # it caught up in between
    assert slow([late] * 5 + [fine] + [late] * 5)[10] == [(1, 0.21, 0.1)]  # it is named again
    assert slow([fine] * 20) == [[]] * 20


def test_short_steps_vary_and_the_faster_half_is_the_measure():
    assert slow([[0.01, 0.055, 0.01]] * 9) == [[]] * 9  # not 50 ms above it
    assert slow([[0.01, 0.07, 0.01]] * 5)[-1] == [(1, 0.07, 0.01)]
    assert slow([[0.1, 0.3]] * 5)[-1] == [(1, 0.3, 0.1)]  # of two, the faster one
    assert slow([[1.0, 0.3, 1.0, 1.0]] * 9) == [[]] * 9


def test_rounds_in_which_a_rank_had_no_work_of_its_own_do_not_count():
    """An evaluation's: they end no row either."""
    late, evaluation = [0.1, 0.3, 0.1], [0.0, 0.3, 0.1]
    assert slow([late] * 4 + [evaluation] * 3 + [late]) == [[]] * 7 + [[(1, 0.3, 0.1)]]


def test_collectives_wait_longer_than_any_section():
    limits = TimeoutConfig(startup=10, first_step=20, step=30, evaluation=700, save=50)
    assert patience(limits) == 700 + 120
