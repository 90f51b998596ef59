"""Running a model: sampling, frame-by-frame generation, conversations."""
