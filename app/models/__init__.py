"""Models that configurations name. They import nothing of this program."""
