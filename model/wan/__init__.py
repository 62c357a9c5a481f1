"""The Wan2.1 transformer, for bidirectional and causal use."""
