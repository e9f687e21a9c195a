"""Copies prepared data and weights from the node that has them to the other nodes of a job.

`offer` runs in the driver, whose node tokenises and downloads. `node_files` runs in the workers: one worker of each
node fetches the directories (`receiver`), through the job's storage or from a Ray actor (`carriers`).
"""
