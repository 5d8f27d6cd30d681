"""Models for use in configurations. They import nothing else of this project."""
