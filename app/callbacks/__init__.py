"""Callbacks that write tables, plots, predictions and logs of a run."""
