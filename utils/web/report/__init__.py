"""Pages that are one file and need no network: a run, runs side by side, the quickstart."""
