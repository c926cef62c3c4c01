# Made of client/forkpoint/_async/_sandboxes.py by tools/unasync_client.py: never edit.
"""Sandboxes: create them, look at them, branch them, fork them, talk to their consoles."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

from forkpoint import _wire, durations
from forkpoint._orders import (
    UNCHANGED,
    Unchanged,
    branch_request,
    create_request,
    fork_spec,
    update_request,
)
from forkpoint._sync._branches import Branching
from forkpoint._sync._calls import Calls
from forkpoint._sync._console import Console
from forkpoint._sync._snapshots import Snapshot
from forkpoint.enums import (
    BranchMode,
    Durability,
    ExpiryAction,
    FailureAction,
    Layout,
    SandboxState,
    choose,
)
from forkpoint.errors import SandboxNotFound
from forkpoint.v1 import sandbox_pb2
from forkpoint.v1 import sandbox_service_pb2 as messages
from forkpoint.views import Drive, SandboxView

if TYPE_CHECKING:
    from forkpoint._sync._forks import Children


class Sandbox(SandboxView):
    """A sandbox with its verbs: the view's fields, as of the last answer about it."""

    __slots__ = ("_calls",)

    def __init__(self, calls: Calls, view: SandboxView) -> None:
        self._calls = calls
        self._take(view)

    def _take(self, view: SandboxView) -> Sandbox:
        for field in fields(SandboxView):
            setattr(self, field.name, getattr(view, field.name))
        return self

    def __repr__(self) -> str:
        return f"<Sandbox {self.id} {self.state}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sandbox) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def console(self) -> Console:
        """Its serial console."""
        return Console(self._calls, self.id)

    def refresh(self) -> Sandbox:
        """Asks the server again; updates this object and returns it."""
        return self._take(Sandboxes(self._calls).get(self.id))

    def update(
        self,
        *,
        labels: Mapping[str, str] | Unchanged | None = UNCHANGED,
        ttl: durations.Duration | Unchanged | None = UNCHANGED,
        on_expiry: ExpiryAction | str | Unchanged = UNCHANGED,
    ) -> Sandbox:
        """Changes what is given (None clears it); updates this object and returns it."""
        changed = Sandboxes(self._calls).update(
            self.id, labels=labels, ttl=ttl, on_expiry=on_expiry
        )
        return self._take(changed)

    def pause(self) -> Sandbox:
        """Makes the guest stand still, and returns once it does. Idempotent."""
        return self._take(Sandboxes(self._calls).pause(self.id))

    def resume(self) -> Sandbox:
        """Lets the guest run, and returns once it does. Idempotent."""
        return self._take(Sandboxes(self._calls).resume(self.id))

    def delete(self) -> None:
        """Ends it. Its snapshots and children stay. No error when it is gone already."""
        Sandboxes(self._calls).delete(self.id, missing_ok=True)

    def branching(
        self,
        *,
        mode: BranchMode | str = BranchMode.AUTO,
        layout: Layout | str = Layout.AUTO,
        durability: Durability | str = Durability.DISK,
        branch_id: str | None = None,
        snapshot_id: str | None = None,
        max_pause: durations.Duration | None = None,
        labels: Mapping[str, str] | None = None,
        allow_drive_copy: bool = False,
        request_id: str | None = None,
        timeout: durations.Duration | None = None,
    ) -> Branching:
        """A branch of this sandbox, to be followed; see `branch` for the arguments."""
        request = branch_request(
            self.id,
            mode=mode,
            layout=layout,
            durability=durability,
            branch_id=branch_id,
            snapshot_id=snapshot_id,
            max_pause=max_pause,
            labels=labels,
            allow_drive_copy=allow_drive_copy,
            request_id=request_id,
        )
        return Branching(self._calls, request, timeout)

    def branch(
        self,
        *,
        mode: BranchMode | str = BranchMode.AUTO,
        layout: Layout | str = Layout.AUTO,
        durability: Durability | str = Durability.DISK,
        branch_id: str | None = None,
        snapshot_id: str | None = None,
        max_pause: durations.Duration | None = None,
        labels: Mapping[str, str] | None = None,
        allow_drive_copy: bool = False,
        request_id: str | None = None,
        timeout: durations.Duration | None = None,
    ) -> Snapshot:
        """Makes a snapshot of this sandbox while it runs.

            snapshot = source.branch()
            for update in source.branching(mode="diff"): ...

        Args:
            mode: "auto", "full" or "diff".
            layout: "auto", "flat" or "layered".
            durability: what READY means: "disk", or "memory", which waits for no disk and is there
                after a restart of the server, but not after a reboot.
            branch_id: chosen by you; None: by the server.
            snapshot_id: chosen by you; None: by the server.
            max_pause: be refused (`PauseTooLong`) if the source would stand still for longer.
            labels: the snapshot's.
            allow_drive_copy: copy writable drives, while the source stands still, where the
                server's file system can't clone them; else that is refused.
            request_id: makes it safe to ask again from another process; None: made here.
            timeout: stop following after this long. The branch goes on.
        """
        return self.branching(
            mode=mode,
            layout=layout,
            durability=durability,
            branch_id=branch_id,
            snapshot_id=snapshot_id,
            max_pause=max_pause,
            labels=labels,
            allow_drive_copy=allow_drive_copy,
            request_id=request_id,
            timeout=timeout,
        ).wait()

    def fork(
        self,
        count: int = 1,
        *,
        mode: BranchMode | str = BranchMode.AUTO,
        layout: Layout | str = Layout.AUTO,
        durability: Durability | str = Durability.DISK,
        max_pause: durations.Duration | None = None,
        branch_id: str | None = None,
        snapshot_id: str | None = None,
        fork_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        ttl: durations.Duration | None = None,
        on_expiry: ExpiryAction | str = ExpiryAction.DELETE,
        on_failure: FailureAction | str = FailureAction.KEEP,
        allow_drive_copy: bool = False,
        strict: bool = False,
        request_id: str | None = None,
        timeout: durations.Duration | None = None,
    ) -> Children:
        """Branches this sandbox and starts `count` children of the snapshot, in one operation.

            with source.fork(10, ttl="10m") as children:
                for child in children:
                    ...

        Leaving the block deletes the children and the snapshot, unless `children.keep()`.

        Args:
            count: how many.
            mode: as for `branch`; so are layout, durability, max_pause, branch_id and snapshot_id.
            fork_id: chosen by you; None: by the server. The children are `<fork_id>-0` and on.
            labels: of every child.
            ttl: time to live of every child: what cleans up should this process die.
            on_expiry: "delete", "pause" or "branch".
            on_failure: "keep" the good children when one fails, or "delete_all".
            allow_drive_copy: copy writable drives where the server's file system can't clone them.
            strict: raise an ExceptionGroup when not all children start.
            request_id: makes it safe to ask again from another process; None: made here.
            timeout: stop following after this long. The fork goes on.
        """
        from forkpoint._sync._forks import Children  # it knows this module already

        request = branch_request(
            self.id,
            mode=mode,
            layout=layout,
            durability=durability,
            branch_id=branch_id,
            snapshot_id=snapshot_id,
            max_pause=max_pause,
            labels=None,
            allow_drive_copy=allow_drive_copy,
            request_id=request_id,
            fork=fork_spec(count, fork_id, labels, ttl, on_expiry, on_failure, allow_drive_copy),
        )
        return Children.of_sandbox(self._calls, request, strict=strict, timeout=timeout)


class Sandboxes:
    """The server's sandboxes."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def create(
        self,
        sandbox_id: str | None = None,
        *,
        kernel: str | os.PathLike[str] | None = None,
        memory_mib: int | None = None,
        vcpus: int = 0,
        initrd: str | os.PathLike[str] | None = None,
        boot_args: str | None = None,
        drives: Iterable[Drive] = (),
        snapshot: Snapshot | str | None = None,
        labels: Mapping[str, str] | None = None,
        ttl: durations.Duration | None = None,
        on_expiry: ExpiryAction | str = ExpiryAction.DELETE,
        allow_drive_copy: bool = False,
        request_id: str | None = None,
        timeout: durations.Duration | None = None,
    ) -> Sandbox:
        """Makes a sandbox by booting a kernel, or from a snapshot; returns once its guest runs.

        Args:
            sandbox_id: chosen by you ([a-z][a-z0-9-]{0,62}); None: by the server.
            kernel: an uncompressed kernel (ELF) on the server's host, in one of its image roots.
            memory_mib: guest memory; required with `kernel`.
            vcpus: 1 to 32; 0: 1.
            initrd: an initrd in the image roots.
            boot_args: the kernel's command line; None: the server's default.
            drives: block devices. Of a writable one the sandbox gets a clone of its own.
            snapshot: start from this snapshot instead of a kernel.
            labels: free text pairs.
            ttl: time to live, such as "10m"; None: until it is deleted.
            on_expiry: "delete", "pause" or "branch".
            allow_drive_copy: copy writable drives where the server's file system can't clone them;
                else that is refused.
            request_id: makes it safe to ask again from another process; None: made here.
            timeout: deadline, if not the client's.
        """
        request = create_request(
            sandbox_id,
            kernel=kernel,
            memory_mib=memory_mib,
            vcpus=vcpus,
            initrd=initrd,
            boot_args=boot_args,
            drives=drives,
            snapshot_id=snapshot.id if isinstance(snapshot, Snapshot) else snapshot,
            labels=labels,
            ttl=ttl,
            on_expiry=on_expiry,
            allow_drive_copy=allow_drive_copy,
            request_id=request_id,
        )
        response = self._calls.unary(self._calls.sandboxes.CreateSandbox, request, timeout=timeout)
        return self._handle(response.sandbox)

    def get(self, sandbox_id: str) -> Sandbox:
        """One sandbox. Raises `SandboxNotFound`."""
        response = self._calls.unary(
            self._calls.sandboxes.GetSandbox, messages.GetSandboxRequest(sandbox_id=sandbox_id)
        )
        return self._handle(response.sandbox)

    def list(
        self,
        *,
        labels: Mapping[str, str] | None = None,
        states: Iterable[SandboxState | str] = (),
        page_size: int = 0,
    ) -> Iterator[Sandbox]:
        """All sandboxes that have all these labels and are in one of these states, oldest first.

        Asks for a page at a time, while it is iterated; `page_size` 0 leaves it to the server.
        """
        wanted = [
            _wire.enum_to(sandbox_pb2.SandboxState, choose(SandboxState, state)) for state in states
        ]
        token = ""
        while True:
            response = self._calls.unary(
                self._calls.sandboxes.ListSandboxes,
                messages.ListSandboxesRequest(
                    page_size=page_size, page_token=token, labels=labels, states=wanted
                ),
            )
            for message in response.sandboxes:
                yield self._handle(message)
            token = response.next_page_token
            if not token:
                return

    def update(
        self,
        sandbox_id: str,
        *,
        labels: Mapping[str, str] | Unchanged | None = UNCHANGED,
        ttl: durations.Duration | Unchanged | None = UNCHANGED,
        on_expiry: ExpiryAction | str | Unchanged = UNCHANGED,
    ) -> Sandbox:
        """Changes what is given: all labels, the time to live from now, what happens then.

        None clears it.
        """
        request = update_request(sandbox_id, labels, ttl, on_expiry)
        response = self._calls.unary(self._calls.sandboxes.UpdateSandbox, request)
        return self._handle(response.sandbox)

    def delete(self, sandbox_id: str, *, missing_ok: bool = False) -> None:
        """Ends a sandbox and removes its folder. Its snapshots and children stay."""
        try:
            self._calls.unary(
                self._calls.sandboxes.DeleteSandbox,
                messages.DeleteSandboxRequest(sandbox_id=sandbox_id),
            )
        except SandboxNotFound:
            if not missing_ok:
                raise

    def deletion(self, sandbox_id: str) -> Callable[[], None]:
        """`delete` of this sandbox, to be run later; it may be gone by then."""

        def run() -> None:
            self.delete(sandbox_id, missing_ok=True)

        return run

    def pause(self, sandbox_id: str) -> Sandbox:
        """Makes the guest stand still, and returns once it does. Idempotent."""
        response = self._calls.unary(
            self._calls.sandboxes.PauseSandbox, messages.PauseSandboxRequest(sandbox_id=sandbox_id)
        )
        return self._handle(response.sandbox)

    def resume(self, sandbox_id: str) -> Sandbox:
        """Lets the guest run, and returns once it does. Idempotent."""
        response = self._calls.unary(
            self._calls.sandboxes.ResumeSandbox,
            messages.ResumeSandboxRequest(sandbox_id=sandbox_id),
        )
        return self._handle(response.sandbox)

    def _handle(self, message: sandbox_pb2.Sandbox) -> Sandbox:
        return Sandbox(self._calls, _wire.sandbox(message))
