"""What Hydra finds of this program: `hydra/sweeper=grid`, `hydra/launcher=pool`.

Hydra imports these modules whenever it starts, so they import the rest where it is used.
"""
