"""Ways for a bucket of weights to reach engine servers."""
