"""What distribution matching may do beside its own loss: an option a file, off unless asked for."""
