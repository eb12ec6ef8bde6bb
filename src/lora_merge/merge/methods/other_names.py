"""What PEFT, mergekit, kohya's scripts and people call methods, and what that is here."""

# The same operation under another name.
SAME = {
    "average": "mean",
    "sum": "cat",
    "concat": "cat",
    "concatenate": "cat",
    "weighted-sum": "svd",
    "svd-merge-lora": "svd",  # kohya's script
    "merge-lora": "cat",  # kohya's script, with --concat
    "dare-linear": "dare",
    "dare-linear-svd": "dare",
    "dare-ties-svd": "dare-ties",
    "ties-svd": "ties",
    "magnitude-prune": "magnitude",
    "magnitude-prune-svd": "magnitude",
    "model-breadcrumbs": "breadcrumbs",
    "lora-lego": "lego",
}
# Something near it, or nothing: one line that says so.
CALLED = {
    "knots": "name what follows the alignment: knots-ties or knots-dare-ties",
    "iso": "it is iso-c (one common subspace) or iso-cts (with each task's own)",
    "nuslerp": "slerp is here, on two adapters, with mergekit's t as -p t=0.5",
    "della-linear": "della elects signs; dare with a density is the same without magnitudes",
    "breadcrumbs-ties": "breadcrumbs is here without the election of signs; ties has it",
    "passthrough": "one adapter in, one out is resize, convert or merge with one ADAPTER",
    "nearswap": "it needs whole models: use mergekit on fused ones (lora-merge fuse)",
    "arcee-fusion": "it needs whole models: use mergekit on fused ones (lora-merge fuse)",
    "x-lora": "gates are no merges: lora-merge gate --preset xlora",
    "xlora": "gates are no merges: lora-merge gate --preset xlora",
    "meteora": "gates are no merges: lora-merge gate --preset meteora",
    "arrow": "gates are no merges: lora-merge gate --preset arrow",
}
