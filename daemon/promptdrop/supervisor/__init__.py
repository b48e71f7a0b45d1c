"""All policy: what to do next when a drop, an answer, a death, a signal or the time comes.

It decides on one loop and leaves what may block to other threads. It knows how engines are held (`pool`,
`cluster`) and where jobs lie (`spool`, `outbox`, `intake`), but not how a picture is computed.
"""
