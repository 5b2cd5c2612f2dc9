"""CalcJobs that run ``eipnn-job``, and calcfunctions that wrap one science call each."""
