"""Sandboxes: created, forked, adopted after a restart, expired, deleted; their consoles and the
snapshots that they stand on.

This room knows Firecracker through `forkpointd.vmm`, the disk through `forkpointd.images` and the
registry. It doesn't know branches (`forkpointd.branching` stands on it) nor gRPC.
"""
