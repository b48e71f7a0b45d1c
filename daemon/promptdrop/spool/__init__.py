"""The queue on disk: the directory is the state, and every transition is one rename.

Nothing here decides what happens next or starts threads that outlive a call. The caller decides what an
error of the disk means.
"""
