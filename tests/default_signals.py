"""Let SIGHUP end a program also under nohup, which lets it be ignored. Imported before util.errors, which checks it."""

import signal

signal.signal(signal.SIGHUP, signal.SIG_DFL)
