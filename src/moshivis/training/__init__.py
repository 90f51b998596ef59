"""Training: recipes, losses, the loop, distribution, checkpoints and resume."""
