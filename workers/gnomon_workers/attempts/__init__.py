"""An attempt at a job, on Ray: how it is started, watched and ended."""
