"""Tests of model/families/wan21/."""
