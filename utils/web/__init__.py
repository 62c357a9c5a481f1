"""The page that a browser shows, and the queue of jobs behind it."""
