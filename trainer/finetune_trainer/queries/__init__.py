"""Queries that somebody else wrote, run on embedded databases: read-only, and in a process that can be killed."""
