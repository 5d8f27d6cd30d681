"""Loss functions, and their weighted sum."""
