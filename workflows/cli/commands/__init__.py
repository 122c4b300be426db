"""One module a command: its arguments, what it calls, and how its result is shown.

A command imports what it runs when it runs it, and after the settings are read: `--help` and a mistyped
setting answer at once.
"""
