#!/usr/bin/env bash
# tl.gather along a row of a one-row tile does not compile with Triton 3.6 and 3.8.
#
# Triton 3.6.0 is what torch 2.11 brings along. Gathering a softmax's weights by a column index,
# then summing, fails in the pass TritonGPUOptimizeThreadLocality for a tile of one row, as decoding
# one token has; 16 rows compile, and so does one row with 3.9.0. No GPU is needed to see it.
#
#   3.6.0 rows 1 PassManager::run failed
#   3.6.0 rows 16 compiles
#   3.8.0 rows 1 PassManager::run failed
#   3.8.0 rows 16 compiles
#   3.9.0 rows 1 compiles
#   3.9.0 rows 16 compiles
#
# What helps: compute what is gathered again from its own entry in memory (a load by the same index)
# and the row's maximum and sum.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/kernel.py" <<'PYTHON'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def kernel(scores, columns, out, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    lanes = tl.arange(0, 32)[None, :]
    s = tl.load(scores + rows * 32 + lanes)
    g = tl.exp(s - tl.max(s, 1)[:, None])
    g = g / tl.sum(g, 1)[:, None]
    r = tl.arange(0, 256)[None, :]
    column = tl.load(columns + r)
    own = tl.gather(g, tl.broadcast_to(column, (ROWS, 256)), 1)
    total = tl.sum(own, 1)[:, None]
    tl.store(out + rows + tl.zeros((ROWS, 1), tl.int32), total)


for rows in (1, 16):
    signature = {"scores": "*fp32", "columns": "*i32", "out": "*fp32", "ROWS": "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs={"ROWS": rows})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        print(triton.__version__, "rows", rows, "compiles")
    except RuntimeError as error:
        print(triton.__version__, "rows", rows, str(error).splitlines()[0])
PYTHON
for version in 3.6.0 3.8.0 3.9.0; do
    python3 -m pip install --quiet --no-deps --target "$work/$version" "triton==$version" >&2
    TRITON_CACHE_DIR="$work/cache-$version" PYTHONPATH="$work/$version" \
        python3 "$work/kernel.py" 2> "$work/log" | tee -a "$work/seen"
done
diff "$work/seen" - <<'EXPECTED'
3.6.0 rows 1 PassManager::run failed
3.6.0 rows 16 compiles
3.8.0 rows 1 PassManager::run failed
3.8.0 rows 16 compiles
3.9.0 rows 1 compiles
3.9.0 rows 16 compiles
EXPECTED
