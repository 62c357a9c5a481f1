"""Tests of utils/tiny_world/."""
