"""A GPU for those who have none: see README.md."""
