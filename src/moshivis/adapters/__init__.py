"""Ways for a picture to reach the frozen backbone."""
