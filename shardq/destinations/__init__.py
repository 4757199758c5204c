"""Where outputs go besides a folder."""
