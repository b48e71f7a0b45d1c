"""Everything that runs in an engine's process: its main loop, the pipeline, kernels and memory.

The one folder whose modules may import torch, each only when its engine is used. It sees images and
settings, never a job, a spool or a path of a dropped file.
"""
