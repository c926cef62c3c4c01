"""The edge: the only room that knows gRPC.

It turns bytes into orders that were checked, hands them to the ports (`ports.py`), and turns what
comes back, errors included, into messages and statuses. It owns no sandbox and no branch.

- `listener.py`: the server: health, reflection, channelz, drain; `unix_socket.py`: its address;
- `handlers.py`: what every call goes through; `drain.py`: the gate that ends them in time;
- `sandbox_service.py` with `branch_service.py`, `fork_service.py` and `console_service.py` mixed
  in, `snapshot_service.py`, `server_service.py`; `health_service.py` and `reflection_service.py`
  beside them;
- `validation.py`, `rules.py`, `image_paths.py`: what is refused at the edge;
- `orders.py` (messages to orders), `convert.py` (model to messages), `scalars.py` (enums, times);
- `status.py`: reasons to statuses; `pages.py`, `fingerprint.py`: page tokens, repeated requests.
"""

import os

# grpc's core reads this once, when it is loaded. Its fork handlers would stop the world at every
# spawn of a VMM, and no child of ours ever uses gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
