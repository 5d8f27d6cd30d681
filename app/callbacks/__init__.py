"""Those who watch a run: they are told values, change nothing, and see no trainer."""
