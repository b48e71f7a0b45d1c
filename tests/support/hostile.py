"""Text that wants to command a terminal, and a look at whether it could."""

import os
import pty
import re
import signal
import subprocess
import termios
import tty
import unicodedata
from typing import Any

# A title (OSC), an empty screen (CSI 2J, and by C1), BEL, a bidi override, more lines by every kind of
# break. Nothing of it is what rich writes. As a file name: no slash.
HOSTILE = "a\x1b]0;owned\x07\x1b[2J\x9b2J\x9d0;x\x9c\u202eb\rc\u2028d\x85\nFAKED\tb\x7f"
HOSTILE_NAME = HOSTILE + "\udcff\udc9b"  # and two bytes that are no UTF-8, the second a C1 control

# What we and rich send to a terminal on purpose: styles; the cursor shown, hidden and moved for a bar,
# its line emptied; the cursor home and an empty screen, in this order, for `status --watch`.
_OURS = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\r?\x1b\[1A|\r?\x1b\[2K|\x1b\[H\x1b\[2J")
_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # categories of characters that a terminal may obey


def harm(output: bytes, is_terminal: bool = False) -> str:
    """Show what in an output could harm a terminal, and lines that are faked; empty if nothing could.

    Raises UnicodeDecodeError: there are bytes that are no UTF-8.
    """
    text = output.decode("utf-8")
    text = _OURS.sub("", text) if is_terminal else text
    obeyed = [c for c in text if unicodedata.category(c) in _OBEYED and c not in "\n\t"]
    faked = [line for line in text.split("\n") if line.startswith("FAKED")]
    return repr(obeyed + faked) if obeyed or faked else ""


def on_terminal(command: list[str] | list[bytes], enough: bytes = b"", **options: Any) -> bytes:
    """Run a command on a pseudo-terminal of 300 columns; returns all that it writes, unchanged.

    enough: once it was written twice, the command is interrupted as by Ctrl-C.
    """
    master, slave = pty.openpty()
    tty.setraw(slave)  # no \r before \n
    termios.tcsetwinsize(slave, (50, 300))
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, **options)
    os.close(slave)
    output = b""
    while part := _read(master):
        output += part
        if enough and output.count(enough) >= 2:
            process.send_signal(signal.SIGINT)
    os.close(master)
    process.wait()
    return output


def _read(master: int) -> bytes:
    """Read from a terminal; empty once nobody has its other end: EIO, pty(7)."""
    try:
        return os.read(master, 1 << 16)
    except OSError:
        return b""
