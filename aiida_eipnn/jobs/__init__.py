"""What runs on the compute node, without AiiDA: one executable, ``eipnn-job``."""
