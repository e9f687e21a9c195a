"""The operator: watches FineTuneJobs and runs each as attempts on an engine.

One way through: `handlers` (kopf) keep `cache` fresh and wake `controller`, which observes a job (`observed`), decides
what to do (`decide`, pure), renders it (`render` and `engines`, pure) and applies it (`apply`, the one place that
writes to the API server).
"""
