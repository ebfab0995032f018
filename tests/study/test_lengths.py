"""Lengths: drawn as asked, or taken from a file that is checked line by line."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from kvwise.core.errors import PlanError
from kvwise.study.lengths import Column, LogNormal, Uniform, draw, read_columns


def test_distributions_stay_in_their_limits() -> None:
    rng = np.random.default_rng(0)
    assert draw(7, 3, rng).tolist() == [7, 7, 7]
    uniform = draw(Uniform(kind="uniform", low=3, high=5), 500, rng)
    assert set(uniform.tolist()) == {3, 4, 5}
    log = draw(LogNormal(kind="lognormal", median=40, sigma=0.8, high=100), 5000, rng)
    assert np.median(log) == pytest.approx(40, rel=0.1)
    assert (log.min(), log.max()) >= (1, 100)


def test_lengths_come_from_a_column_and_are_scaled(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("input_tokens,output_tokens\n100,10\n200,1\n")
    drawn = draw(Column(kind="csv", file=str(path), column="output_tokens", scale=0.1), 50, np.random.default_rng(0))
    assert set(drawn.tolist()) == {1}
    assert read_columns(path, ("input_tokens",))["input_tokens"].tolist() == [100, 200]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "no column 'c'"),
        ("c\n", "has no rows"),
        ("c\n1\nx\n", "line 3: c='x'"),
        ("c\n-1\n", "line 2: c='-1'"),
        ("c\nnan\n", "line 2"),
        ("", "it has: nothing"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(PlanError) as caught:
        read_columns(path, ("c",))
    assert words in str(caught.value)
    assert "x.csv" in str(caught.value)


def test_a_missing_file_and_one_that_is_not_gzip(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="is no file"):
        read_columns(tmp_path / "no.csv", ("c",))
    (tmp_path / "fake.csv.gz").write_text("c\n1\n")
    with pytest.raises(PlanError, match="no readable CSV"):
        read_columns(tmp_path / "fake.csv.gz", ("c",))


def test_low_above_high_is_refused() -> None:
    with pytest.raises(PlanError, match="swap them"):
        draw(Uniform(kind="uniform", low=5, high=3), 1, np.random.default_rng(0))
