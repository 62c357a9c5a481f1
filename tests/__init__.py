"""The tests, which mirror the packages; pytest puts the folder above this one on the path."""
