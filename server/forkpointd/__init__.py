"""forkpointd: the server that branches running microVMs; its rooms and rules are in docs/design/."""
