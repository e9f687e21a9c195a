"""The operator: watch FineTuneJobs and run each as attempts on an engine.

The watches (`operator`, `observe/`) update the cache and queue jobs for the controller. For each job it takes a
snapshot, decides what to do (`decide/`, pure), renders the objects (`plan`, `render/`, `engines/`, pure) and applies
them (`apply`, the only module that writes jobs' objects to the API server).
"""
