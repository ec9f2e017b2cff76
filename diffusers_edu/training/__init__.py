"""Training: objectives, data, configuration, and one Accelerate loop that knows objectives, not rungs."""
