"""Checks that a node has what a job needs, and returns the remedies: `finetune doctor`.

`gather` reads facts from the machine and changes nothing. The checks (`toolchain`, `devices`, `libraries`, `host`,
`fabric`) are pure functions of these facts and of the job's needs. Each returns one `Finding`.
"""
