"""The server: many conversations at once over HTTP and WebSockets. Needs the packages of `moshivis[serve]`."""
