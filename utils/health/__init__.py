"""What a run's own samples tell of it: figures that nobody has learnt, and alarms on them."""
