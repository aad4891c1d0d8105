"""The kernel house: knows shapes and bits, nothing of Qwen."""
