"""Tests of model/folders/."""
