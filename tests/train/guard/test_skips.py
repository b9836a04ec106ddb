"""Which steps count as skipped in a row, when the host learns of them, and what going back forgets. No run needed."""

import pytest
import torch

from train.guard.errors import TrainingFailed
from train.guard.skips import Skips


def queued(skips: Skips, flags: dict[int, int]) -> None:
    for step, flag in flags.items():
        skips.add(step, torch.tensor(float(flag)))


def test_steps_are_known_once_and_in_order_and_a_good_one_ends_the_row():
    skips = Skips(3)
    queued(skips, {1: 0, 2: 1, 3: 1, 4: 0, 5: 1})
    assert skips.known(2) == [2] and skips.known(2) == [] and skips.known(5) == [3, 5]
    assert skips.in_a_row == [5] and not skips.too_many
    queued(skips, {6: 1})
    assert skips.known(6) == [6] and not skips.too_many
    queued(skips, {7: 1})
    assert skips.known(7) == [7] and skips.too_many


def test_a_good_step_behind_too_many_does_not_hide_them_and_going_back_forgets_it():
    skips = Skips(2)
    queued(skips, {1: 1, 2: 1, 3: 0, 4: 1})
    assert skips.known(4) == [1, 2] and skips.too_many
    assert skips.go_back(None) == ([1, 2], "steps 1 to 2 had no finite gradient")
    assert not skips.too_many and skips.known(4) == []
    queued(skips, {1: 0, 2: 0, 3: 1, 4: 1})
    assert skips.known(4) == [3, 4] and skips.go_back(None)[0] == [3, 4]  # other steps
    queued(skips, {2: 1, 3: 1})
    assert skips.known(3) == [2, 3]
    with pytest.raises(TrainingFailed, match="steps 2 to 3 had no finite gradient, again after going back"):
        skips.go_back(None)


def test_a_state_that_was_refused_leads_back_once():
    skips = Skips(2)
    queued(skips, {7: 1})
    skips.known(7)
    assert skips.go_back(10) == ([10], "the state after step 10 was not finite")
    queued(skips, {7: 1, 8: 0})
    assert skips.known(8) == [7] and not skips.too_many  # the row began anew
    assert skips.go_back(15)[0] == [15]
    with pytest.raises(TrainingFailed, match="the state after step 10 was not finite, again"):
        skips.go_back(10)
