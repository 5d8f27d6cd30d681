"""Files, locks, signals, seeds, devices and errors: what every other package stands on."""
