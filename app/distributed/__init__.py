"""Several processes as one: collectives, strategies and how ranks are launched."""
