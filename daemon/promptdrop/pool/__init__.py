"""The daemon's side of its engines: how many there are, which is alive, silent, killed or replaced.

It speaks the pipe's protocol and knows no jobs. Torch is never imported here; that happens at the other
end of the pipe, in `engines`.
"""
