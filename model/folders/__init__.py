"""Model folders on disk: what lies where, and how networks are read from and written to them."""
