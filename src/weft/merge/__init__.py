"""Several models made into one, and an adapter made part of its base, tensor by tensor out of their files.

combine   the rules, on plain tensors: linear, SLERP, TIES
models    model folders in, a model folder out; `checkpoints` are those of one run
adapter   an adapter and its base in, a model folder out
"""
