"""Checks of the model, data and settings of all stages before training starts; all faults are reported at once.

`job` combines the checks. Those of the data do not need the libraries that take seconds to import for the model, so on
a cluster both run in parallel.
"""
