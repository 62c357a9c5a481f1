"""Tests of utils/web/report."""
