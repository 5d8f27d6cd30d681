"""Files, locks, signals, seeds, devices and errors: the layer below every other package."""
