"""Processes that begin with the libraries imported, because they are forked from one that has imported them.

On a node of a cluster every worker of Ray, every helper of Ray Train and the driver would otherwise import the same
libraries, each for seconds of CPU. `server` imports them once and forks; `worker` is what Ray runs in place of its own
start of a worker; `start` is `ray start` with that put in. Where there is no server, all is as without this package.
"""
