"""What is trained on: prompts, records, shards and encoded prompts, and in which order."""
