"""The embedded world of moving shapes: its clips, its judge, its figures and its codec."""
