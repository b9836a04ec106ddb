import math

import pytest

from train.config import Config, ConfigError
from train.engine.schedule import evaluation_due, learning_rate

CONFIG = Config.model_validate(
    {
        "model": {"name": "cat_nano"},
        "data": {"path": "somewhere"},
        "train": {"epochs": 10},
        "optimizer": {"lr": 1.0},
        "schedule": {"warmup_epochs": 2, "warmup_lr": 0.1, "min_lr": 0.01},
    }
)


def test_warmup_is_linear_and_the_rest_one_cosine():
    rates = [learning_rate(CONFIG, step, 100) for step in range(1000)]
    assert rates[0] == 0.1
    assert math.isclose(rates[100], 0.55)
    assert all(later > earlier for earlier, later in zip(rates[:200], rates[1:200], strict=False))
    assert all(later < earlier for earlier, later in zip(rates[200:], rates[201:], strict=False))
    assert math.isclose(rates[500], 0.01 + 0.99 / 2)
    assert abs(rates[999] - 0.01) < 1e-5


def test_max_steps_does_not_change_the_schedule():
    short = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"max_steps": 5})})
    assert [learning_rate(short, step, 100) for step in range(5)] == [
        learning_rate(CONFIG, step, 100) for step in range(5)
    ]


def with_schedule(train: dict, **schedule: object) -> Config:
    tree = CONFIG.model_dump(mode="json")
    tree["train"] |= {"epochs": None, **train}
    tree["schedule"] |= schedule
    return Config.model_validate(tree)


def test_a_run_in_steps_is_that_in_epochs():
    steps = with_schedule({"steps": 1000}, warmup_steps=200)
    assert [learning_rate(steps, step, 7) for step in range(1000)] == [
        learning_rate(CONFIG, step, 100) for step in range(1000)
    ]
    assert (steps.total_steps(7), CONFIG.total_steps(100), CONFIG.last_step(100)) == (1000, 1000, 1000)


def test_poly_falls_to_its_minimum():
    poly = with_schedule({"steps": 1000}, kind="poly", power=0.9, warmup_steps=0)
    rates = [learning_rate(poly, step, 7) for step in (0, 500, 999)]
    assert rates == [pytest.approx(0.01 + 0.99 * (1 - step / 1000) ** 0.9) for step in (0, 500, 999)]


@pytest.mark.parametrize("decays", [{"decay_epochs": [8, 9]}, {"decay_steps": [800, 900]}])
def test_multistep_falls_at_each_decay(decays):
    multistep = with_schedule({"epochs": 10}, kind="multistep", decay_rate=0.1, warmup_epochs=1, **decays)
    rates = [learning_rate(multistep, step, 100) for step in (100, 799, 800, 899, 900, 999)]
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01, 0.01])


def test_evaluation_and_checkpoints_in_steps_or_epochs():
    steps = with_schedule({"steps": 100, "evaluate_every_steps": 30}, warmup_steps=5)
    assert [done for done in range(101) if evaluation_due(steps, done, 7)] == [30, 60, 90, 100]
    epochs = with_schedule({"epochs": 5, "evaluate_every": 2})
    assert [done for done in range(51) if evaluation_due(epochs, done, 10)] == [20, 40, 50]
    off = with_schedule({"steps": 100, "evaluate_every_steps": 30, "evaluate_every": 0}, warmup_steps=5)
    assert not any(evaluation_due(off, done, 7) for done in range(101))
    assert (steps.checkpoint_interval(7), epochs.checkpoint_interval(10)) == (7, 10)


@pytest.mark.parametrize(
    ("train", "schedule", "sentence"),
    [
        ({"epochs": 10, "steps": 100}, {}, "train.epochs and train.steps both give a run's length"),
        ({}, {}, "train.epochs is null"),
        ({"steps": 100}, {"warmup_steps": 100}, "schedule.warmup_steps 100 leaves nothing of train.steps 100"),
        ({"epochs": 10}, {"kind": "multistep"}, "takes one of schedule.decay_epochs and decay_steps"),
        ({"epochs": 10}, {"decay_steps": [5]}, "takes none of schedule.decay_epochs and decay_steps"),
    ],
)
def test_what_does_not_fit_together_is_refused(train, schedule, sentence):
    with pytest.raises(ValueError, match=sentence):
        with_schedule(train, **schedule)


def test_a_warm_up_that_fills_the_run_is_refused_in_whatever_unit():
    with_schedule({"steps": 201}, warmup_epochs=2).check_warmup(100)
    with pytest.raises(ConfigError, match="the warm-up takes 200 of the run's 200 steps: lower schedule.warmup_epochs"):
        with_schedule({"steps": 200}, warmup_epochs=2).check_warmup(100)
    with pytest.raises(ConfigError, match="the warm-up takes 300 of the run's 200 steps: lower schedule.warmup_steps"):
        with_schedule({"epochs": 2}, warmup_steps=300).check_warmup(100)
