"""Vocabulary of the operator: settings, names, conditions, the snapshot of a job, and checked progress reports."""
