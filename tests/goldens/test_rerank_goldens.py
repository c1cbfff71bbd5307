"""Re-ranked orders, addresses and recalls against those that the authors' re-ranking code computed.

Arrays hold the first k1 + 5 of each order (captions' orders run down the columns); beyond k1 it is the plain order.
"""

import re
from functools import partial

import numpy as np
import pytest

from dualmatch.runtime import recall, rerank

from .cases import Case, cases_of

JSON = "rerank.json"
FACTS = {"kind", "n", "K1", "seed", "equals_stable_sort", "metrics"}
INPUTS = {"sim", "sim_T"}
CASES = cases_of("rerank", JSON)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_case_has_numbers_and_arrays(case):
    assert case.numbers(JSON)
    assert case.arrays()


def metrics(result: recall.Metrics) -> list[float]:
    return [result.r1, result.r5, result.r10, result.median, result.mean]


def check_i2t(case, arrays, k1):
    golden = arrays[f"i2t_K1_{k1}"]
    np.testing.assert_array_equal(rerank.i2t(arrays["sim"], k1), golden[:, :k1])
    np.testing.assert_array_equal(rerank.best_captions(arrays["sim"], golden.shape[1])[:, k1:], golden[:, k1:])


def check_i2t_addresses(case, arrays, k1):
    np.testing.assert_array_equal(rerank.i2t_addresses(arrays["sim"], k1)[1], arrays[f"i2t_address_K1_{k1}"])


def check_t2i(case, arrays, k1):
    golden = arrays[f"t2i_K1_{k1}"].T
    np.testing.assert_array_equal(rerank.t2i(arrays["sim"], k1), golden[:, :k1])
    np.testing.assert_array_equal(rerank.best_images(arrays["sim"], golden.shape[1])[:, k1:], golden[:, k1:])


def check_t2i_through_neighbours(case, arrays, k1, k2):
    golden = arrays[f"t2i_new_K1_{k1}_K2_{k2}"].T
    np.testing.assert_array_equal(rerank.t2i_through_neighbours(arrays["sim"], arrays["sim_T"], k1, k2), golden[:, :k1])
    np.testing.assert_array_equal(rerank.best_images(arrays["sim"], golden.shape[1])[:, k1:], golden[:, k1:])


def check_t2i_up_to_ties(case, arrays, k1):
    """Above 16 candidates the authors' sort was not stable: the same addresses in the same places is all that can agree."""
    golden = arrays[f"t2i_K1_{k1}_order_within_ties_arbitrary"].T[:, :k1]
    candidates, addresses = rerank.t2i_addresses(arrays["sim"], k1)
    for ours, theirs, images, address in zip(rerank.t2i(arrays["sim"], k1), golden, candidates, addresses, strict=True):
        address_of = dict(zip(images.tolist(), address.tolist(), strict=True))
        assert set(ours.tolist()) == set(theirs.tolist())
        assert [address_of[image] for image in ours.tolist()] == [address_of[image] for image in theirs.tolist()]


def check_tied_rows(case, arrays):
    numbers = case.numbers(JSON)
    addresses = np.sort(rerank.i2t_addresses(arrays["sim"], numbers["K1"])[1], axis=1)
    tied = (addresses[:, 1:] == addresses[:, :-1]).any(axis=1)
    assert int(tied.sum()) == numbers["rows_with_tied_addresses"]


def check_i2t_recall(case, arrays, aspect, *, after):
    reranker = partial(rerank.i2t, k1=case.numbers(JSON)["K1"]) if after else None
    assert metrics(recall.evaluate(arrays["sim"], i2t=reranker).i2t) == pytest.approx(
        case.numbers(JSON)[aspect], rel=1e-12
    )


def check_t2i_recall(case, arrays, aspect, k1=None, k2=None):
    candidates = None
    if k2 is not None:
        candidates = rerank.t2i_through_neighbours(arrays["sim"], arrays["sim_T"], k1, k2)
    elif k1 is not None:
        candidates = rerank.t2i(arrays["sim"], k1)
    assert metrics(recall.evaluate(arrays["sim"], t2i=candidates).t2i) == pytest.approx(
        case.numbers(JSON)[aspect], rel=1e-12
    )


CHECKS = {
    r"i2t_K1_(\d+)": lambda case, arrays, _, k1: check_i2t(case, arrays, k1),
    r"i2t_address_K1_(\d+)": lambda case, arrays, _, k1: check_i2t_addresses(case, arrays, k1),
    r"t2i_K1_(\d+)": lambda case, arrays, _, k1: check_t2i(case, arrays, k1),
    r"t2i_new_K1_(\d+)_K2_(\d+)": lambda case, arrays, _, k1, k2: check_t2i_through_neighbours(case, arrays, k1, k2),
    r"t2i_K1_(\d+)_order_within_ties_arbitrary": lambda case, arrays, _, k1: check_t2i_up_to_ties(case, arrays, k1),
    r"rows_with_tied_addresses": lambda case, arrays, _: check_tied_rows(case, arrays),
    r"acc_i2t_before": partial(check_i2t_recall, after=False),
    r"acc_i2t_after_rerank": partial(check_i2t_recall, after=True),
    r"acc_t2i_before": check_t2i_recall,
    r"acc_t2i_after_t2i_rerank_(\d+)": check_t2i_recall,
    r"acc_t2i_after_t2i_rerank_new_(\d+)_(\d+)": check_t2i_recall,
}


def aspects(case: Case) -> list[str]:
    return sorted((case.numbers(JSON).keys() - FACTS) | (case.arrays().keys() - INPUTS))


@pytest.mark.parametrize(("case", "aspect"), [(case, aspect) for case in CASES for aspect in aspects(case)], ids=str)
def test_rerank(case, aspect):
    matches = [(check, match) for pattern, check in CHECKS.items() if (match := re.fullmatch(pattern, aspect))]
    assert len(matches) == 1, f"{case}: nothing tests {aspect!r}"
    check, match = matches[0]
    check(case, case.arrays(), aspect, *map(int, match.groups()))
