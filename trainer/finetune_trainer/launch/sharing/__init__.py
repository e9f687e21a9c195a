"""Prepared data and weights, from the node that has them to the nodes that lack them.

`offer` runs on the driver's node, which tokenises and downloads. `node_files` runs in the workers: one worker of each
node fetches (`receiver`), through the job's storage or from a Ray actor (`carriers`).
"""
