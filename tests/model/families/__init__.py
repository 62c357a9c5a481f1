"""Tests of model/families/."""
