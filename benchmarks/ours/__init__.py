"""What upslope does, measured: `python -m benchmarks.ours NAME`."""
