import pytest

pytest.register_assert_rewrite("tests.train.tasks.dense_runs")
