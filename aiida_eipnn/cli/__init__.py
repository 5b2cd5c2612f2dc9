"""The command line ``aiida-eipnn``."""
