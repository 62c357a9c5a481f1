"""A family for the tests, as one is added: this folder in model/families/, and nothing else."""

from model.families.toy.release import Toy

__all__ = ["Toy"]
