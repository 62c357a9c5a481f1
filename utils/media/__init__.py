"""Pictures and clips: in and out of files, their names, and how they were made."""
