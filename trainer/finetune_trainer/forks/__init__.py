"""Starts processes with the libraries imported, by forking a server process that has imported them once.

Otherwise the driver, every Ray worker and every helper actor of Ray Train on a node would import the same libraries,
each for seconds of CPU time. `server` imports them and forks; `worker` is the script that Ray runs instead of its own
to start a worker; `start` is `ray start` with that script. Without a server, processes start as usual. The environment
variable FINETUNE_FORK_SERVER=0 switches the server off.
"""
