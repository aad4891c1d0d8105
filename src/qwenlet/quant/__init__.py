"""Making quantized checkpoints, and measuring what that cost.

gptq          the algorithm alone: one weight, the correlations of its inputs -> codes
calibration   texts -> token ids
pipeline      a checkpoint -> a quantized checkpoint, layer by layer
workfolder    what a run has finished, so that it can go on
outcome       what a run did, kept until its quality is measured
report        quality of the result
"""
