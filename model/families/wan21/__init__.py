"""Wan2.1: official folders and diffusers', text to video and image to video."""

from model.families.wan21.release import Wan21

__all__ = ["Wan21"]
