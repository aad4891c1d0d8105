"""Training: fine-tuning, and pre-training from nothing.

records      files -> dialogues and texts, with file and line
samples      ... -> token ids and which of them are learned, kept on disk
batches      ... -> the batches of a run, in an order that a step's number finds
objective    a batch -> the loss
loss         cross-entropy that never holds the logits whole
trainer      the one loop
processes    several processes share it
optimizer    AdamW and its state by names
schedule     the learning rate
checkpoints  what a run keeps to go on from
journal      what it writes down
"""
