"""Looking into adapters: plain results as frozen dataclasses, nothing printed."""

from lora_merge.analysis.budget import Certificate
from lora_merge.analysis.measures import Measures, measure
from lora_merge.analysis.rank_rule import RankRule, parse_rule, rule_names
from lora_merge.analysis.ranks import ModuleRank, RankPlan, choose_ranks

__all__ = [
    "Certificate",
    "Measures",
    "ModuleRank",
    "RankPlan",
    "RankRule",
    "choose_ranks",
    "measure",
    "parse_rule",
    "rule_names",
]
