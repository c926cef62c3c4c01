"""The client, written once: the async one. `forkpoint._sync` is made of it, never edited."""
