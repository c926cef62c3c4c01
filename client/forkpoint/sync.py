"""The client without `await`: the same names, the same behaviour, from threads.

    from forkpoint import sync

    with sync.connect() as fp:
        source = fp.sandboxes.get("agent-7")
        snapshot = source.branch()
        for update in source.branching(mode="diff"):
            print(update.stage)
        with source.fork(10, ttl="10m") as children:
            for child in children:
                print(child.console.ask("uname -a"))

One difference: the async `source.branch()` is both awaited and iterated; here `branch()` waits for
the snapshot and `branching()` is iterated.
"""

from forkpoint._sync._branches import Branches, Branching
from forkpoint._sync._client import Client, connect
from forkpoint._sync._console import Attachment, Console
from forkpoint._sync._forks import Children, Forks
from forkpoint._sync._sandboxes import Sandbox, Sandboxes
from forkpoint._sync._server import Server
from forkpoint._sync._snapshots import Snapshot, Snapshots

__all__ = [
    "Attachment",
    "Branches",
    "Branching",
    "Children",
    "Client",
    "Console",
    "Forks",
    "Sandbox",
    "Sandboxes",
    "Server",
    "Snapshot",
    "Snapshots",
    "connect",
]
