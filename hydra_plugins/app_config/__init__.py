"""Where Hydra reads configurations from, with limits."""
