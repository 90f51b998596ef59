"""Building blocks that codec, backbone and depth transformer share."""
