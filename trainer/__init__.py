"""The training loop, the trainers that schedule it, and the composition root that wires a run."""
