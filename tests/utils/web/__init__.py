"""Tests of utils/web."""
