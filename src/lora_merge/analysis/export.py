"""Spectra as documents: JSON (strict, no NaN) and CSV."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_merge.adapters.measured.spectra import AdapterSpectra
from lora_merge.analysis.advice import advise
from lora_merge.files.atomic import atomic_file
from lora_merge.ranks.measures import tail_energy

_COLUMNS = ("adapter", "module", "i", "sigma", "energy")
CSV_MARK = ",".join(_COLUMNS).encode()  # the first line says that a table is one of these
_DEFINITIONS = {
    "singular_values": "of scaling * B @ A, descending",
    "energy": "sum of squared singular values",
    "stable_rank": "frobenius^2 / spectral^2",
    "effective_rank": "exp(entropy of s / sum s), Roy & Vetterli 2007",
    "entropy_rank_energy": "exp(entropy of s^2 / sum s^2)",
    "participation_ratio": "(sum s^2)^2 / sum s^4",
    "participation_sigma": "(sum s)^2 / sum s^2",
    "ranks_at": "smallest rank that holds this share of the energy",
    "noise_tail": "last values as close together as those of random factors",
}


def spectra_document(spectra: Sequence[AdapterSpectra]) -> dict[str, Any]:
    """Everything measured, as JSON values."""
    return {
        "schema": 1,
        "definitions": _DEFINITIONS,
        "adapters": [{**s.to_dict(), "advice": advise(s).to_dict()} for s in spectra],
    }


def write_csv(spectra: Sequence[AdapterSpectra], path: Path) -> None:
    """One line per singular value: adapter, module, i, value, energy up to i.

    Raises:
        OutputError: If the file cannot be written.
    """
    with (
        atomic_file(path, mark=CSV_MARK) as staging,
        staging.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for one in spectra:
            for module in one.finite:
                tail = tail_energy(module.values).tolist()
                for i, sigma in enumerate(module.values.tolist(), 1):
                    energy = 1 - tail[i] / tail[0] if tail[0] > 0 else 0.0
                    writer.writerow([one.adapter, module.name, i, sigma, energy])
