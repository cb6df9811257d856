"""Decide: pure functions from what a step touched to what should be where, when."""
