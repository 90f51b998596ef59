"""Measures of what a model says and how it sounds."""
