"""The demo: a server of its own, a running source, branches, ten children, and the proof.

It claims only what it checks, and says so: `Outcome.claims` has every claim with whether it held.

- `machine`: how large the source may be here;
- `server`: a forkpointd in a temporary folder, which leaves nothing behind;
- `guest`: the witness guest's commands, and what its memory should hold;
- `story`: what is done, in order;
- `report`: how it is told.
"""

from forkpoint.demo.story import Options, Outcome, perform

__all__ = ["Options", "Outcome", "perform"]
