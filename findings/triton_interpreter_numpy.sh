#!/usr/bin/env bash
# Triton's interpreter up to 3.6 cannot run a loop with a bound of run time beside numpy 2.4.
#
# With TRITON_INTERPRET=1 the bound of `range` is an array of one entry, which Triton 3.6.0 (what
# torch 2.11 brings along) turns into a number by int(); numpy 2.4 allows that for 0 dimensions only.
# 3.7.0 squeezes it first. Both versions are current, and neither names the other.
#
#   triton 3.6.0 numpy 2.3.5 runs
#   triton 3.6.0 numpy 2.4.6 InterpreterError: TypeError
#   triton 3.7.0 numpy 2.4.6 runs
#
# What helps: numpy below 2.4 where kernels are tried in the interpreter of Triton 3.6 or earlier.
# Compiled kernels are not concerned.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
python="$work/venv/bin/python"
cat > "$work/count.py" <<'PYTHON'
import numpy
import triton
import triton.language as tl


@triton.jit
def count(n, k: tl.constexpr):
    total = 0
    for i in range(tl.cdiv(n, k)):
        total += i
    tl.device_assert(total >= 0)


try:
    count[(1,)](7, 2)
    said = "runs"
except Exception as error:
    said = f"{type(error).__name__}: {str(error).partition('(')[0]}"
print("triton", triton.__version__, "numpy", numpy.__version__, said)
PYTHON
for pair in 3.6.0/2.3.5 3.6.0/2.4.6 3.7.0/2.4.6; do
    triton="$work/triton-${pair%/*}" numpy="$work/numpy-${pair#*/}"
    for package in "$triton" "$numpy"; do
        pinned=$(basename "$package" | sed 's/-/==/')
        [ -d "$package" ] || "$python" -m pip install --quiet --no-deps --target "$package" "$pinned" >&2
    done
    TRITON_INTERPRET=1 PYTHONPATH="$triton:$numpy" "$python" "$work/count.py" | tee -a "$work/seen"
done
diff "$work/seen" - <<'EXPECTED'
triton 3.6.0 numpy 2.3.5 runs
triton 3.6.0 numpy 2.4.6 InterpreterError: TypeError
triton 3.7.0 numpy 2.4.6 runs
EXPECTED
