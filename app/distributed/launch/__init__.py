"""Launchers that start the ranks of a run, or join those that torchrun or srun has started."""
