"""temp"""
from __future__ import annotations
def preflight(run): pass
