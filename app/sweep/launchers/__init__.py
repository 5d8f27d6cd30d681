"""Where the jobs of a sweep run: in a pool of processes, or in those of another launcher."""

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # in this process
POOL_LAUNCHER = "hydra_plugins.app_sweeps.pool.PoolLauncher"
