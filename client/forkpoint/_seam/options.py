"""How both clients' channels are set up."""

from __future__ import annotations

from collections.abc import Sequence

CHANNEL_OPTIONS: Sequence[tuple[str, str | int]] = (
    # Over a Unix socket the authority would be the path, which servers refuse when it has
    # characters that no host name has.
    ("grpc.default_authority", "localhost"),
    ("grpc.enable_http_proxy", 0),
    # A page of 1,000 sandboxes with all their labels is larger than gRPC's 4 MiB.
    ("grpc.max_receive_message_length", -1),
    # A restarted server is found again within a second (gRPC's own limit is two minutes).
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Clients to one address in one process don't share a connection that another one closes.
    ("grpc.use_local_subchannel_pool", 1),
)
