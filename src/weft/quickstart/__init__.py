"""The main job: from raw text to a model that writes it, on two cores.

settings   every size, rate and share of the job, in one place
corpus     what is read: the running interpreter's standard library, or a folder of the user's
split      which modules are held out, and which go together because one gives another away
pairs      (signature and docstring, body) pairs for fine-tuning, made with `ast`
baselines  bits a byte of gzip, xz and a byte n-gram model on the same held-out bytes
steps      the job's steps, each a function from what came before to a result
training   pretraining and fine-tuning through `weft.train`
scoring    bits a byte of a model on held-out text
judge      the share of sampled functions that parse
ledger     what of a run is done, so that the same command carries on
pipeline   the steps in order
report     the result as lines, JSON and Markdown
picture    the result as a PNG
"""
