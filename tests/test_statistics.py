"""Intervals of paired differences against tables and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from convattn_jax.statistics import paired_interval, smallest_difference


def test_three_differences_have_the_interval_of_the_t_table():
    found = paired_interval([0.1, 0.2, 0.6])
    half = 4.302653 * math.sqrt(0.07) / math.sqrt(3)  # the 97.5 % point of t with two degrees of freedom
    assert found.n == 3
    assert found.mean == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx((0.3 - half, 0.3 + half), abs=1e-6)
    assert not found.excludes_zero


def test_the_interval_excludes_zero_where_the_paired_test_rejects_it():
    a, b = np.array([3.31, 3.36, 3.29, 3.34]), np.array([3.35, 3.39, 3.34, 3.37])
    found = paired_interval((a - b).tolist())
    test = stats.ttest_rel(a, b)
    reference = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    assert test.pvalue < 0.05
    assert found.excludes_zero


def test_one_difference_has_no_interval():
    assert paired_interval([0.5]) == (1, 0.5, None, None, None)
    assert not paired_interval([0.5]).excludes_zero


def test_equal_differences_have_no_width():
    assert paired_interval([0.25, 0.25]) == (2, 0.25, 0.25, 0.25, 0.0)


def test_the_smallest_difference_of_many_is_the_normal_approximation():
    normal = (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / math.sqrt(4000)
    assert smallest_difference(1.0, 4000) == pytest.approx(normal, rel=1e-3)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_the_smallest_difference_is_found_four_times_in_five(n):
    difference = smallest_difference(2.0, n)
    draws = np.random.default_rng(0).normal(difference, 2.0, (20_000, n))
    assert np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.01)


def test_the_smallest_difference_grows_with_the_spread():
    assert smallest_difference(3.0, 5) == pytest.approx(3 * smallest_difference(1.0, 5))
