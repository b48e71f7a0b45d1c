"""The same engines on the hosts of a Ray cluster, under the same supervision.

Ray is imported only in the gateway's process, on the hosts and for `promptdrop cluster`; the daemon
speaks to the gateway through a socket.
"""
