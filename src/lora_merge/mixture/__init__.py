"""Gated mixtures of LoRA adapters at inference: gates, directories, attaching, training."""

from lora_merge.mixture.attach import AttachedMixture, load_mixture
from lora_merge.mixture.gate import PRESETS, GateSpec, activate, gate_spec
from lora_merge.mixture.mixture import Expert, Mixture
from lora_merge.mixture.settings import TrainSettings
from lora_merge.mixture.train import train_gate

__all__ = [
    "PRESETS",
    "AttachedMixture",
    "Expert",
    "GateSpec",
    "Mixture",
    "TrainSettings",
    "activate",
    "gate_spec",
    "load_mixture",
    "train_gate",
]
