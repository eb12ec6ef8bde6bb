#!/usr/bin/env bash
# ptxas moves a tile's loads behind a softmax that they do not need, unless a barrier stands between.
#
# A kernel asks for its tile of weights first, so that memory works while the gate is computed. Triton
# keeps that order: in its PTX the ld.global.v4 stand before every shuffle. In the machine code for
# compute capability 9.0 none of the 16-byte loads is before the first shuffle: they wait for the
# gate. With tl.debug_barrier() after the load all of them stay in front. No GPU is needed.
#
#   3.6.0 plain: 0 of 8 wide loads before the first shuffle, in PTX all
#   3.6.0 barrier: 8 of 8 wide loads before the first shuffle, in PTX all
#   3.9.0 plain: 0 of 8 wide loads before the first shuffle, in PTX all
#   3.9.0 barrier: 8 of 8 wide loads before the first shuffle, in PTX all
#
# What helps: a barrier after loads that are meant to be under way, and a look at the SASS, not at
# the source.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/kernel.py" <<'PYTHON'
import re
import subprocess
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def kernel(scores, units, up, out, BARRIER: tl.constexpr):
    r = tl.arange(0, 256)
    n = tl.arange(0, 64)
    rows = tl.load(up + r[:, None] * 64 + n[None, :])
    if BARRIER:
        tl.debug_barrier()
    s = tl.load(scores + tl.arange(0, 32))
    top = tl.max(s, 0)
    total = tl.sum(tl.exp(s - top), 0)
    own = tl.exp(tl.load(scores + r // 8) - top) / total
    z = tl.load(units + r) * own
    tl.store(out + n, tl.sum(z[:, None] * rows.to(tl.float32), 0))


def before(steps, load, wait):
    first = next(i for i, step in enumerate(steps) if step.startswith(wait))
    return sum(step.startswith(load) for step in steps[:first])


signature = {"scores": "*fp32", "units": "*fp32", "up": "*bf16", "out": "*fp32"}
aligned = {(place,): [["tt.divisibility", 16]] for place in range(4)}
tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
for barrier in (False, True):
    source = ASTSource(
        fn=kernel, signature={**signature, "BARRIER": "constexpr"},
        constexprs={"BARRIER": barrier}, attrs=aligned,
    )
    target = GPUTarget("cuda", 90, 32)
    done = triton.compile(source, target=target, options={"num_warps": 8})
    path = Path(sys.argv[1]) / "kernel.cubin"
    path.write_bytes(done.asm["cubin"])
    dump = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True)
    sass = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", dump.stdout)
    ptx = re.findall(r"(ld\.global\.v4|shfl)", done.asm["ptx"])
    wide = sum(step.startswith("LDG.E.128") for step in sass)
    told = "all" if before(ptx, "ld", "shfl") == ptx.count("ld.global.v4") else "not all"
    print(
        f"{triton.__version__} {'barrier' if barrier else 'plain'}: "
        f"{before(sass, 'LDG.E.128', 'SHFL')} of {wide} wide loads before the first shuffle, "
        f"in PTX {told}"
    )
PYTHON
for version in 3.6.0 3.9.0; do
    python3 -m pip install --quiet --no-deps --target "$work/$version" "triton==$version" >&2
    TRITON_CACHE_DIR="$work/cache-$version" PYTHONPATH="$work/$version" \
        python3 "$work/kernel.py" "$work" 2> "$work/log" | tee -a "$work/seen"
done
diff "$work/seen" - <<'EXPECTED'
3.6.0 plain: 0 of 8 wide loads before the first shuffle, in PTX all
3.6.0 barrier: 8 of 8 wide loads before the first shuffle, in PTX all
3.9.0 plain: 0 of 8 wide loads before the first shuffle, in PTX all
3.9.0 barrier: 8 of 8 wide loads before the first shuffle, in PTX all
EXPECTED
