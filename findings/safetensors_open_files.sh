#!/usr/bin/env bash
# safetensors 0.8.0: at the limit of open files, `safe_open` says that a file which is there does not
# exist: FileNotFoundError without an errno, "No such file or directory: PATH". Python's own `open`
# says EMFILE, "Too many open files". Whoever merges hundreds of adapters looks for a lost file.
#
# Seen here:
#   safetensors 0.8.0
#   open:      OSError errno 24: Too many open files
#   safe_open: FileNotFoundError errno None: No such file or directory: one.safetensors
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.2.6
cd "$here"
"$here/venv/bin/python" - <<'PYTHON'
import resource

import numpy
import safetensors
from safetensors import safe_open
from safetensors.numpy import save_file

print("safetensors", safetensors.__version__)
save_file({"a": numpy.zeros(2, numpy.float32)}, "one.safetensors")
with safe_open("one.safetensors", framework="np") as file:
    assert file.get_tensor("a").shape == (2,)
resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
kept = []
try:
    while True:
        kept.append(open("one.safetensors", "rb"))
except OSError as error:
    print(f"open:      {type(error).__name__} errno {error.errno}: {error.strerror}")
    assert error.errno == 24
try:
    safe_open("one.safetensors", framework="np")
except FileNotFoundError as error:
    print(f"safe_open: {type(error).__name__} errno {error.errno}: {error}")
    assert error.errno is None and "No such file" in str(error)
else:
    raise SystemExit("it opened")
PYTHON
