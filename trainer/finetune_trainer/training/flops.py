from __future__ import annotations
def training_flops(model, context):
    return 6.0*sum(p.numel() for p in model.parameters()), None
