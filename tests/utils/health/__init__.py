"""Tests of utils/health."""
