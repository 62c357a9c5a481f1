"""What a released model is: each family in a file or folder of its own, found by being there."""
