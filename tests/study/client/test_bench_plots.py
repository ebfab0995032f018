"""What `kvwise bench --plot` draws, as data."""

import pytest

from kvwise.study.chart import Shape
from kvwise.study.client.plots import distribution, throughput
from tests.study.client.test_figures import DONE


def test_tokens_are_drawn_over_the_second_in_which_they_came() -> None:
    chart = throughput(DONE)
    assert chart is not None
    assert chart.shape is Shape.STEP  # a value holds from its x to the next one's
    (line,) = chart.series
    assert line.x == (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    assert line.y == (5.0, 2.0, 0.0, 0.0, 3.0, 3.0)


def test_a_distribution_tells_the_share_up_to_each_value() -> None:
    chart = distribution("ttft", "TTFT", [0.3, 0.1, 0.2, 0.2])
    assert chart is not None
    (line,) = chart.series
    assert line.x == pytest.approx((100, 200, 200, 300))
    assert line.y == (0.25, 0.5, 0.75, 1.0)
    assert [rule.text for rule in chart.rules] == ["p50: 200 ms", "p99: 297 ms"]


def test_nothing_measured_is_nothing_drawn() -> None:
    assert distribution("itl", "ITL", []) is None
    assert throughput([]) is None
