"""Turn the bytes of a job file into images: decode, read the format, check the fields of a mapping.

Nothing here touches the disk or knows the spool: the same bytes and configuration always give the same
request, or the same refusal.
"""
