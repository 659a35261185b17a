"""Runs variants of an experiment, collects their results, and reports them."""
