"""What may be stored how between forward and backward, and the store that does it."""

from dpmem.activations.policy import PRESETS, Policy
from dpmem.activations.store import ActivationStore

__all__ = ["PRESETS", "ActivationStore", "Policy"]
