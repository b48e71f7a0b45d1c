"""From the bytes of a job file to its images: decoding, one reader per format, the fields of a mapping.

Nothing here touches the disk or knows the spool: the same bytes and configuration always give the same
request, or the same refusal.
"""
