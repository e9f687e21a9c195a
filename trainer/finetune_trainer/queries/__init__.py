"""Run untrusted queries on embedded databases: read-only, and in a process that can be killed."""
