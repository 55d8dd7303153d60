"""What proves a kernel where there is no GPU."""
