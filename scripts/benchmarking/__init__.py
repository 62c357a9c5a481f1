"""What scripts/benchmark.py is made of: workloads, meters, and the same mathematics plainly."""
