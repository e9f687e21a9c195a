"""What a GPU node needs, what it has, and what to do about the difference: `finetune doctor`.

`gather` reads facts from the machine and changes nothing. The checks (`toolchain`, `devices`, `libraries`, `host`,
`fabric`) are pure functions of those facts and of what a job needs. Each returns one `Finding`.
"""
