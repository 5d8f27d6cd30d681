"""Hydra plugins of this package: `hydra/sweeper=grid`, `=optuna` and `hydra/launcher=pool`.

Every Hydra program in the same environment imports these modules, so they import `app` only inside
methods.
"""
