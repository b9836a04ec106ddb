import math

from train.config import Config
from train.engine.schedule import learning_rate

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
    assert [learning_rate(short, step, 100) for step in range(5)] == [learning_rate(CONFIG, step, 100) for step in range(5)]
