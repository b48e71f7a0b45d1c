"""From the bytes of a job file to the images it asks for: decoding, one reader per format, the fields.

Nothing here touches the disk or knows the spool: the same bytes and configuration always give the same
request, or the same refusal.
"""
