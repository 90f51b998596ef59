"""Token streams, the backbone over time and the depth transformer over the codebooks of one frame."""
