"""Sweeps: the jobs, who runs them, the table and the page at the end."""
