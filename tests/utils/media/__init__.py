"""Tests of utils/media/."""
