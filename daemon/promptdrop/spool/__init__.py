"""The queue on disk: the directory is the state, and every transition is one rename.

Nothing here decides what happens next, and nothing here starts threads that outlive a call. What an
error of the disk means is for the caller to say.
"""
