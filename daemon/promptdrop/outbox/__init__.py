"""Images and their sidecars, made visible to readers once and whole.

It writes into the outbox and into the job's own folder, and never moves a job from state to state:
the spool does that.
"""
