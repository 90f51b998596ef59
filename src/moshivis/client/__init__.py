"""Talking to a server from a terminal. Needs no model; the packages that it needs are in `moshivis[serve]`."""
