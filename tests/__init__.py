"""The tests. SIGHUP does what it does outside of nohup, which lets programs ignore it: some tests send it."""

import signal

signal.signal(signal.SIGHUP, signal.SIG_DFL)
