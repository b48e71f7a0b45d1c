"""The daemon's side of its engines: starts them, notices silence, kills and replaces them.

It speaks the pipe's protocol and knows no jobs. Torch is never imported here; that happens at the other
end of the pipe, in `engines`.
"""
