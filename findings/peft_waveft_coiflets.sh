#!/usr/bin/env bash
# PEFT 0.21.2's WaveFT has tables of wavelet filters of its own. Its config takes 74 families, its
# tables have 24, and two of them are not the wavelets they are called after: "coif4" is not of norm 1,
# "coif5" has 48 taps where the wavelet has 30. So a WaveFT adapter trained with "coif4" holds
# coefficients of no wavelet basis, and read with PyWavelets' filters it gives another delta.
#
# The two files are read without the package, which would bring torch along. Seen:
#   peft 0.21.2 PyWavelets 1.9.0
#   families: 74 in the config, 24 with filters
#   coif4: 24 taps, norm^2 1.009919; PyWavelets 24 taps, norm^2 1.000000
#   coif5: 48 taps, norm^2 1.016555; PyWavelets 30 taps, norm^2 1.000000
#   others that differ: none
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps peft==0.21.2 2>/dev/null
"$folder/venv/bin/pip" install -q --disable-pip-version-check PyWavelets==1.9.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - "$folder"/venv/lib/python3*/site-packages/peft/tuners/waveft <<'PY'
import sys
from importlib.metadata import version

import numpy as np
import pywt

sys.path.insert(0, sys.argv[1])
from constants import WAVELET_REDUCTIONS
from wavelet import _WAVELET_COEFFS, Wavelet

print("peft", version("peft"), "PyWavelets", version("PyWavelets"))
print(f"families: {len(WAVELET_REDUCTIONS)} in the config, {len(_WAVELET_COEFFS)} with filters")
assert (len(WAVELET_REDUCTIONS), len(_WAVELET_COEFFS)) == (74, 24)


def differ(name):
    ours, theirs = Wavelet(name), pywt.Wavelet(name)
    pairs = [(ours.rec_lo, theirs.rec_lo), (ours.rec_hi, theirs.rec_hi)]
    return any(len(a) != len(b) or np.abs(np.subtract(a, b)).max() > 1e-7 for a, b in pairs)


for name in ("coif4", "coif5"):
    ours, theirs = np.array(Wavelet(name).rec_lo), np.array(pywt.Wavelet(name).rec_lo)
    print(f"{name}: {len(ours)} taps, norm^2 {ours @ ours:.6f}; "
          f"PyWavelets {len(theirs)} taps, norm^2 {theirs @ theirs:.6f}")
    assert differ(name)
    assert abs(theirs @ theirs - 1) < 1e-9
assert abs(np.square(Wavelet("coif4").rec_lo).sum() - 1) > 1e-3
assert len(Wavelet("coif5").rec_lo) == 48
wrong = [n for n in _WAVELET_COEFFS if n not in ("coif4", "coif5") and differ(n)]
print("others that differ:", ", ".join(wrong) or "none")
assert not wrong
PY
