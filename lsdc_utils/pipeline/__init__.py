"""What ./run_all.sh does: parameters, the graph of steps, progress, commands."""
