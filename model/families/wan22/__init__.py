"""Wan2.2: TI2V-5B, one network behind an autoencoder of its own, and A14B, two experts."""

from model.families.wan22.experts import Wan22Experts
from model.families.wan22.ti2v import Wan22TI2V

__all__ = ["Wan22Experts", "Wan22TI2V"]
