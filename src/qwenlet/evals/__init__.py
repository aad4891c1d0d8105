"""Measuring models: tasks, runners, the sandbox for what a model writes, reports."""
