"""The verbs of the `moshivis` command that need more than a line."""
