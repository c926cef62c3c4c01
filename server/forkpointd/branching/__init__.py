"""The heart: the life of one branch, from admission to READY.

    admission.py   what is refused, which mode is used, and the room that is reserved
    life.py        one branch, stage by stage; which failure leaves what behind
    record.py      the branch as it stands: durable first, then shown
    source.py      its source's dirty base, and the window that is opened on it
    opening.py     the window's files and requests: made before it, read right after
    imaging.py     pre-copy, merge, finalise: the files of the snapshot that is being made
    prediction.py  how long a window is expected to be
    unmerged.py    diffs that could not be merged when they were taken
    write_back.py  images in memory, written to the disk when nobody waits for it
    recovery.py    what a restarted server does with the branches it finds
    service.py     all branches: start, watch, list, cancel
    workshop.py    the parts that all branches share

The room asks `forkpointd.sandboxes` for the source, its turn and its row, `forkpointd.images` for
files and `forkpointd.vmm` for the window. It doesn't know gRPC.
"""
