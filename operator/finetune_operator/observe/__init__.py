"""Observation of the cluster: watches, their cache, and the progress reports of running attempts."""
