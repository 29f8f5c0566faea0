"""What users are told of many problems, and of libraries' errors."""

from __future__ import annotations

import pytest

from train.errors import MOST_PROBLEMS, UserError, first_line, refuse


def test_of_many_records_the_first_are_told_and_how_many_more() -> None:
    problems = [f"line {number}." for number in range(MOST_PROBLEMS + 3)]
    with pytest.raises(UserError) as told:
        refuse(problems, rest="records are no questions")
    assert told.value.problems == (*problems[:MOST_PROBLEMS], "3 more records are no questions.")
    with pytest.raises(UserError) as told:
        refuse(problems[:MOST_PROBLEMS], rest="records are no questions")
    assert told.value.problems == tuple(problems[:MOST_PROBLEMS])
    with pytest.raises(UserError) as told:
        refuse(problems)  # settings: all of them
    assert len(told.value.problems) == len(problems)
    refuse([], rest="records are no questions")


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n it is so\n because")) == "it is so"
    assert first_line(KeyError()) == "KeyError"
