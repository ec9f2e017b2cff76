"""The scheduler: the forward and the reverse process."""
