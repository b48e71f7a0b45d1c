"""From a file in the inbox to a job: look, read, claim, then resolve or refuse.

What happens to a job afterwards is the supervisor's business, to which this folder only reports.
"""
