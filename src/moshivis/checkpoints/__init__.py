"""Checkpoints: our own folders, and the released files. Nothing here ever unpickles."""
