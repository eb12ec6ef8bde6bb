"""What to do with a set of adapters, on sets where the answer is known."""

from builders import make_adapter
from lora_merge.adapters.adapter import Adapter
from lora_merge.analysis.compare import compare
from lora_merge.analysis.verdicts import SetVerdict, judge, judge_set


def scaled(name: str, factor: float, seed: int) -> Adapter:
    """The adapter of a seed with another scaling."""
    return make_adapter(name, seed=seed, alpha=8 * factor)


def set_of(*adapters: Adapter) -> SetVerdict:
    comparison = compare(list(adapters))
    return judge_set(comparison, judge(comparison))


def test_a_set_of_unrelated_adapters_is_merged_with_the_numbers_that_say_so():
    verdict = set_of(*(make_adapter(str(i), seed=i) for i in range(3)))
    assert verdict.action == "merge" and "--scale auto" in verdict.reason
    assert "mean cosine" in verdict.reason and "unrelated ones: 58 %" in verdict.reason


def test_copies_and_empty_adapters_are_left_out_first():
    verdict = set_of(
        make_adapter("a", seed=0), make_adapter("b", seed=1), make_adapter("c", seed=0)
    )
    assert (verdict.action, verdict.adapters) == ("prune", (2,))


def test_adapters_that_undo_each_other_belong_behind_a_gate():
    verdict = set_of(make_adapter("a", seed=0), scaled("b", -1.01, 0))
    assert verdict.action == "gate" and "1 of 1 pairs" in verdict.reason


def test_an_adapter_that_drowns_the_others_is_reweighted():
    several = [make_adapter(str(i), seed=i) for i in range(3)]
    verdict = set_of(*several, scaled("loud", 50.0, 9))
    assert (verdict.action, verdict.adapters) == ("reweight", (3,))
