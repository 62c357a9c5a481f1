"""Tests of model/encoders/."""
