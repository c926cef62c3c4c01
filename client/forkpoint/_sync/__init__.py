# Made of client/forkpoint/_async by tools/unasync_client.py: never edit.
"""The sync client: the async one without waiting."""
