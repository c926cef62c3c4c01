"""The bench: what forkpoint takes, beside what plain sockets take on the same Firecracker.

`python -m bench quick` takes about three minutes and says what it could find out in that time;
`python -m bench full` has no time limit, and only its figures are claimed. README.md beside this
file says what each figure is and how it is taken.

This package drives Firecracker with code of its own (`bench.floor`): it shares nothing with the
server's window, so a mistake there can't make the floor look the same.
"""
