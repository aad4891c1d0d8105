"""Making quantized checkpoints.

gptq          the algorithm alone: one weight, one Hessian
calibration   texts -> token ids
pipeline      layer by layer through a model, resumable, and the folder at the end
"""
