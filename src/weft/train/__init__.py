"""One training loop for every stage of a model's life.

objective    what a trainer minimises: terms with counts of their own
window       one optimiser step's worth of micro-batches: forward, backward, one global count a term
optim        AdamW and Muon behind one face; matrices says which weights are which
schedule     learning rates as a pure function of the step
budget       a number of steps, or minutes that become one
checkpoint   everything a run is, on disk: exact resume after a kill at any moment
origins      the models a run reads, by fingerprint: with others it does not go on
trainer      the loop
recipe       a run as data: YAML with overrides
chain        several runs one after the other from one file
rollout      answers of the live policy, for online objectives
assemble     a recipe into a trainer
"""
