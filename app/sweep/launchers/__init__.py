"""Where the jobs of a sweep run: a pool of processes, or another launcher."""
