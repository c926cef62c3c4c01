"""The thread that runs the guest, and the console it talks through.

Pausing is a handshake: the API thread says it wants a pause, the guest thread finishes its step,
puts the guest's state into memory and parks. While it is parked guest memory does not change and
input waits in the pipe. A console whose reader is gone loses output; one that is full stops the
guest (and then a pause has to wait), both as with Firecracker.
"""

from __future__ import annotations

import os
import select
import threading
import time
from typing import Final

from .guest import WitnessGuest
from .memory import GuestMemory

_STDIN: Final = 0
_STDOUT: Final = 1
_READ_BYTES: Final = 64  # the UART's FIFO
_POLL_NS: Final = 2_000_000
"""How often a busy guest looks for input."""
_WATCH_TICK_MS: Final = 20
"""How long a guest that watches the clock sleeps between two ticks."""


class Vcpu:
    """Runs one guest on a thread of its own. Made parked; `resume` starts it."""

    def __init__(self, memory: GuestMemory, tsc_start: int = 0) -> None:
        self._tsc_origin = time.monotonic_ns() - tsc_start
        self._guest = WitnessGuest(memory, self._say, self.tsc)
        self._change = threading.Condition()
        self._wanted = False  # a pause
        self._parked = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._input = b""
        self._stdin_open = True
        self._polled_ns = 0
        self.shut_down = False
        """The guest crashed: the machine is over."""
        self.shutdown_event: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Readable once `shut_down` is set."""
        self._thread = threading.Thread(target=self._run, name="vcpu", daemon=True)

    def tsc(self) -> int:
        """The guest's time stamp counter: 1 GHz, and it runs on while the machine is paused."""
        return time.monotonic_ns() - self._tsc_origin

    def boot(self) -> None:
        """Starts a fresh guest, running."""
        self._guest.store()
        self._guest.boot()
        self._thread.start()

    def restore(self) -> None:
        """Starts the guest that guest memory holds, parked."""
        self._guest.restore()
        self._wanted = True
        self._thread.start()
        with self._change:
            self._change.wait_for(lambda: self._parked)

    # --- the API thread ----------------------------------------------------------------------

    def pause(self) -> None:
        """Returns when the guest stands still and its state is in memory."""
        with self._change:
            self._wanted = True
            os.eventfd_write(self._wake, 1)
            self._change.wait_for(lambda: self._parked)

    def resume(self) -> None:
        """Returns when the guest runs."""
        with self._change:
            self._wanted = False
            self._change.notify_all()
            self._change.wait_for(lambda: not self._parked)

    # --- the guest thread --------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            if self._wanted:
                self._park()
            guest = self._guest
            if guest.halted:
                self._wait(None, for_input=False)
            elif guest.crashed:
                self._crash()
            elif guest.reads:
                self._take(self._byte(None))
            elif guest.watches:
                self._watch()
            else:
                guest.step()
                if guest.writes_freely and time.monotonic_ns() - self._polled_ns > _POLL_NS:
                    self._polled_ns = time.monotonic_ns()
                    self._take(self._byte(0))

    def _park(self) -> None:
        self._guest.store()
        with self._change:
            self._parked = True
            self._change.notify_all()
            self._change.wait_for(lambda: not self._wanted)
            self._parked = False
            self._change.notify_all()

    def _crash(self) -> None:
        """Nothing is left of the guest but a hlt: what it is woken by, it can't survive."""
        if self._wait(None, for_input=not self.shut_down):
            self.shut_down = True
            os.eventfd_write(self.shutdown_event, 1)

    def _watch(self) -> None:
        """One tick of `w`: sleeps instead of spinning, and doesn't count that as a gap."""
        self._guest.tick()
        slept_from = self.tsc()
        byte = self._byte(_WATCH_TICK_MS)
        self._guest.tick(min(self.tsc() - slept_from, _WATCH_TICK_MS * 1_000_000))
        self._take(byte)

    def _take(self, byte: int | None) -> None:
        if byte is not None:
            self._guest.take(byte)

    # --- the console -------------------------------------------------------------------------

    def _byte(self, timeout_ms: int | None) -> int | None:
        """The next byte of input; None when the time is over, at its end, or for a pause."""
        if not self._input and self._wait(timeout_ms, for_input=True):
            try:
                self._input = os.read(_STDIN, _READ_BYTES)
                self._stdin_open = bool(self._input)
            except BlockingIOError:
                pass  # another reader of the same FIFO was quicker
            except OSError:
                self._stdin_open = False  # closed, or the terminal hung up: no more input
        if not self._input:
            return None
        byte, self._input = self._input[0], self._input[1:]
        return byte

    def _wait(self, timeout_ms: int | None, *, for_input: bool) -> bool:
        """Waits for input, if wanted, or for a pause. True where there is input to read."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if for_input and self._stdin_open:
            poll.register(_STDIN, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(timeout_ms)}
        if self._wake in ready:
            os.eventfd_read(self._wake)
        return _STDIN in ready

    def _say(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(_STDOUT, data) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(_STDOUT, select.POLLOUT)
                poll.poll()
            except OSError:
                return  # nobody is attached to the UART: what it sends is lost
