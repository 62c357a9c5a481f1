"""Wan2.2 as families."""
