"""Training data: samples, the layouts they are stored in, and the order in which they are read."""
